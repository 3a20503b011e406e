package lock

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/fault"
)

func TestOneHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if _, err := Read(path); fault.KindOf(err) != fault.NotFound {
		t.Errorf("no file: %v", err)
	}
	me := Holder{PID: os.Getpid(), StartTime: 7, Build: "b", Since: time.Unix(1700000000, 0).UTC()}
	held, err := Acquire(path, me)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Read(path); err != nil || got != me {
		t.Errorf("read %+v, %v", got, err)
	}
	_, err = Acquire(path, Holder{PID: 99, Build: "other"})
	if fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "(build b)") {
		t.Errorf("a second holder: %v", err)
	}
	if got, _ := Read(path); got != me {
		t.Errorf("the loser wrote %+v", got)
	}
	if err := held.Release(); err != nil {
		t.Fatal(err)
	}
	again, err := Acquire(path, Holder{PID: 99, Build: "other"})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Release()
	if got, _ := Read(path); got.PID != 99 {
		t.Errorf("read %+v", got)
	}
}

func TestNonsenseNamesNobody(t *testing.T) {
	for _, text := range []string{"", "12\n", `{"pid":1}`, `{"pid":-4}`, "{"} {
		path := filepath.Join(t.TempDir(), "lock")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if h, err := Read(path); fault.KindOf(err) != fault.NotFound {
			t.Errorf("%q names %+v, %v", text, h, err)
		}
	}
}
