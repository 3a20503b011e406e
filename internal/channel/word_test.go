package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// startWords is a guest that answers words with what answer says, and streams with an echo.
func startWords(t *testing.T, p io.ReadWriteCloser, answer Answer) {
	l := Listen(p, answer)
	var wg sync.WaitGroup
	wg.Go(func() { echo(l, &wg) })
	t.Cleanup(func() { l.Close(); wg.Wait() })
}

func newTestHost(t *testing.T, dial func(context.Context) (net.Conn, error)) *Host {
	h := NewHost(dial)
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func reverse(_ byte, question []byte) (byte, []byte, func()) {
	answer := bytes.Clone(question)
	for i, j := 0, len(answer)-1; i < j; i, j = i+1, j-1 {
		answer[i], answer[j] = answer[j], answer[i]
	}
	return 0, answer, nil
}

// Words and streams share the pipe: neither waits for the other, and no byte of one gets into the other.
func TestWordsBesideStreams(t *testing.T) {
	p, dial := newPort(t)
	startWords(t, p, reverse)
	h := newTestHost(t, dial)
	ctx := within(t, 20*time.Second)
	say := func(question []byte) {
		_, want, _ := reverse(0, question)
		code, answer, err := h.Say(ctx, 1, question)
		if err != nil || code != 0 || !bytes.Equal(answer, want) {
			t.Errorf("asked %d bytes: %d, %d bytes, %v", len(question), code, len(answer), err)
		}
	}
	say([]byte("first, before there are streams"))
	say(nil)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			if err := roundTrip(ctx, h, 300_000); err != nil {
				t.Errorf("stream %d: %v", i, err)
			}
		})
		wg.Go(func() {
			for k := range 20 {
				say(bytes.Repeat([]byte{esc, byte(i), codeWord}, 100*k))
			}
		})
	}
	wg.Wait()
}

// What is left to do is done when the answer has been written, and a failure has its code.
func TestWordThatFails(t *testing.T) {
	p, dial := newPort(t)
	after := make(chan struct{})
	startWords(t, p, func(kind byte, _ []byte) (byte, []byte, func()) {
		return kind + 1, []byte("no"), func() { close(after) }
	})
	h := newTestHost(t, dial)
	ctx := within(t, 10*time.Second)
	code, answer, err := h.Say(ctx, 41, nil)
	if err != nil || code != 42 || string(answer) != "no" {
		t.Errorf("%d %q, %v", code, answer, err)
	}
	select {
	case <-after:
	case <-ctx.Done():
		t.Error("what was left to do was not done")
	}
}

// An answer that comes when nobody waits for it any more is not taken for that to the next question.
func TestWordThatIsGivenUp(t *testing.T) {
	p, dial := newPort(t)
	slow, begun := make(chan struct{}), make(chan struct{})
	startWords(t, p, func(kind byte, question []byte) (byte, []byte, func()) {
		if kind == 1 {
			close(begun)
			<-slow
		}
		return 0, question, nil
	})
	h := newTestHost(t, dial)
	ctx, cancel := context.WithCancel(within(t, 10*time.Second))
	gaveUp := make(chan error, 1)
	go func() {
		_, _, err := h.Say(ctx, 1, []byte("slow"))
		gaveUp <- err
	}()
	<-begun
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	close(slow)
	for i := range 10 {
		if _, answer, err := h.Say(within(t, 10*time.Second), 2, []byte("quick")); err != nil || string(answer) != "quick" {
			t.Errorf("%d: %q, %v", i, answer, err)
		}
	}
}

// Whoever gives up, again and again, ends nobody's stream; and late answers come in any order.
func TestStreamsOutliveWordsThatAreGivenUp(t *testing.T) {
	p, dial := newPort(t)
	slow, begun := make(chan struct{}), make(chan struct{})
	startWords(t, p, func(kind byte, question []byte) (byte, []byte, func()) {
		if kind == 1 {
			begun <- struct{}{}
			<-slow
		}
		return 0, question, nil
	})
	h := newTestHost(t, dial)
	ctx := within(t, 10*time.Second)
	stream, err := h.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		giveUp, cancel := context.WithCancel(ctx)
		go func() {
			<-begun
			cancel()
		}()
		if _, _, err := h.Say(giveUp, 1, []byte("slow")); !errors.Is(err, context.Canceled) {
			t.Fatalf("given up: %v", err)
		}
	}
	for range 5 {
		slow <- struct{}{}
	}
	for i := range 10 {
		if _, answer, err := h.Say(ctx, 2, []byte{byte(i)}); err != nil || !bytes.Equal(answer, []byte{byte(i)}) {
			t.Errorf("%d: %q, %v", i, answer, err)
		}
	}
	if err := stream.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stream, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stream, make([]byte, 1)); err != nil {
		t.Errorf("the stream ended: %v", err)
	}
}

// A guest that knows no words is asked otherwise, over a new session.
func TestWordsUnknown(t *testing.T) {
	p, dial := newPort(t)
	startWords(t, p, nil)
	h := newTestHost(t, dial)
	ctx := within(t, 10*time.Second)
	if _, _, err := h.Say(ctx, 1, []byte("x")); !errors.Is(err, ErrMute) {
		t.Errorf("got %v", err)
	}
	if err := roundTrip(ctx, h, 1000); err != nil {
		t.Error(err)
	}
}

// A guest that says more than it was asked is hostile, and one that says a word of great length as well.
func TestHostileWords(t *testing.T) {
	long := binary.BigEndian.AppendUint32([]byte{esc, codeWord, 0, 1}, MaxWord+1)
	for name, wire := range map[string][]byte{
		"unasked": bytes.Repeat(word{0, 9, []byte("x")}.bytes(), 3),
		"long":    long,
	} {
		c := &hostConn{synced: true, answers: make(chan word, 1)}
		c.decoder = decoder{data: c.onData, reset: c.onReset, word: c.onWord, garbled: c.onGarbled}
		if err := c.decoder.write(wire); err == nil {
			t.Errorf("%s: not refused", name)
		}
	}
}

// A session that was idle when its host went is taken down when the next one needs streams, and no word waits for that;
// streams that somebody reads end at once.
func TestWordsLeaveOldStreamsAlone(t *testing.T) {
	p, dial := newPort(t)
	l := Listen(p, reverse)
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	ended := make(chan error, 2)
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				_, err := io.Copy(io.Discard, c)
				c.Close()
				ended <- err
			})
		}
	})
	ctx := within(t, 10*time.Second)
	first := newTestHost(t, dial)
	if _, err := first.Open(ctx); err != nil {
		t.Fatal(err)
	}
	second := newTestHost(t, dial)
	first.Close()
	if _, _, err := second.Say(ctx, 1, []byte("x")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-ctx.Done():
		t.Error("a stream of the host that went is still read")
	}
}
