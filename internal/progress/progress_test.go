package progress

import (
	"errors"
	"reflect"
	"testing"
	"testing/synctest"
	"time"
)

func TestRunTellsBeginningAndEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []Event
		sink := Sink(func(e Event) { got = append(got, e) })
		boom := errors.New("boom")
		if err := sink.Run("boot", func() error { time.Sleep(2 * time.Second); return nil }); err != nil {
			t.Fatal(err)
		}
		err := sink.Run("agent", func() error { sink.Update("agent", "half", 0.5); return boom })
		if !errors.Is(err, boom) {
			t.Fatal(err)
		}
		sink.Notice("slower path")
		want := []Event{
			{Stage: "boot", Status: Started, Fraction: -1},
			{Stage: "boot", Status: Done, Fraction: 1, Duration: 2 * time.Second},
			{Stage: "agent", Status: Started, Fraction: -1},
			{Stage: "agent", Status: Update, Message: "half", Fraction: 0.5},
			{Stage: "agent", Status: Failed, Message: "boom", Fraction: -1},
			{Status: Notice, Message: "slower path", Fraction: -1},
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v", got)
		}
	})
}

func TestNilSinkWorks(t *testing.T) {
	var sink Sink
	sink.Notice("x")
	sink.Update("s", "x", 1)
	ran := false
	if err := sink.Run("s", func() error { ran = true; return nil }); err != nil || !ran {
		t.Errorf("%v, ran %v", err, ran)
	}
}
