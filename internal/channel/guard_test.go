package channel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"
	"testing/iotest"
	"time"
)

func frame(kind byte, flags uint16, stream, length uint32, body ...byte) []byte {
	b := []byte{0, kind}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	b = binary.BigEndian.AppendUint32(b, length)
	return append(b, body...)
}

// Only what a guest of ours never sends is refused, wherever the reads are cut; bodies may hold anything.
func TestGuard(t *testing.T) {
	body := frame(2, flagSYN, 0, 1)
	good := bytes.Join([][]byte{
		frame(1, 2, 1, 0), frame(frameData, 0, 1, uint32(len(body)), body...), frame(2, 2, 0, 7), frame(frameData, 4, 1, 0), frame(1, 4, 1, 99),
	}, nil)
	for name, bad := range map[string][]byte{
		"nothing": nil, "ping": frame(2, flagSYN, 0, 1), "stream": frame(1, flagSYN, 2, 0), "stream with data": frame(frameData, flagSYN|4, 2, 3, 1, 2, 3),
	} {
		wire := append(bytes.Clone(good), bad...)
		for cut, r := range map[string]io.Reader{"whole": bytes.NewReader(wire), "bytes": iotest.OneByteReader(bytes.NewReader(wire))} {
			_, err := io.ReadAll(&guard{r: r})
			if refused := errors.Is(err, errUnasked); refused != (bad != nil) {
				t.Errorf("%s, %s: %v", name, cut, err)
			}
		}
	}
}

// A guest that pings without reading costs the host a session, not memory.
func TestGuestThatFloodsWithPings(t *testing.T) {
	host, wire := net.Pipe()
	defer wire.Close()
	go func() {
		preamble := make([]byte, 64)
		n, _ := wire.Read(preamble)
		_, _ = wire.Write(preamble[:n]) // the guest answers with what it was asked
		for range 100_000 {
			if _, err := wire.Write(stuff(nil, frame(2, flagSYN, 0, 7))); err != nil {
				return
			}
		}
	}()
	h := NewHost(func(context.Context) (net.Conn, error) { return host, nil })
	defer h.Close()
	s, err := h.connect(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	most := 0
	for {
		most = max(most, runtime.NumGoroutine())
		select {
		case <-s.CloseChan():
			if most > 500 {
				t.Fatalf("%d goroutines", most)
			}
			return
		case <-time.After(time.Millisecond):
			if most > 500 {
				t.Fatalf("%d goroutines and no end", most)
			}
		case <-t.Context().Done():
			t.Fatal("the session lives on")
		}
	}
}
