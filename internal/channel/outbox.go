package channel

import (
	"encoding/binary"
	"io"
	"sync"
)

// outboxMost is from how many bytes on that wait for the pipe whoever has more waits, too.
const outboxMost = 64 << 10

// outbox is what waits to be written on the guest's port. Each write on that takes a turn of the host's, so what
// comes during one goes together in the next.
type outbox struct {
	port io.Writer
	wake chan struct{} // of whoever runs it; of size 1

	turn  sync.Mutex // of whoever writes on the port; taken before mu
	spare []byte

	mu   sync.Mutex
	room sync.Cond // of mu: something went, or nothing goes any more
	buf  []byte
	err  error // of the port: something was lost, and the session with it
}

func newOutbox(port io.Writer) *outbox {
	o := &outbox{port: port, wake: make(chan struct{}, 1)}
	o.room.L = &o.mu
	return o
}

// run writes what was put until done.
func (o *outbox) run(done <-chan struct{}) {
	for {
		select {
		case <-o.wake:
			_ = o.flush() // the next put says it
		case <-done:
			return
		}
	}
}

// flush writes what there is. When it returns, all that was put before it began has been written.
func (o *outbox) flush() error {
	o.turn.Lock()
	defer o.turn.Unlock()
	o.mu.Lock()
	out, err := o.buf, o.err
	o.buf = o.spare[:0]
	o.mu.Unlock()
	if err == nil && len(out) > 0 {
		err = writeFull(o.port, out)
	}
	o.spare = out
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.err = err
	}
	o.room.Broadcast()
	return err
}

// nudge has run write what there is.
func (o *outbox) nudge() {
	select {
	case o.wake <- struct{}{}:
	default: // it will
	}
}

// bodyFollows tells that p is the header of a yamux frame whose body is the next to be written.
func bodyFollows(p []byte) bool {
	return len(p) == frameHeader && p[1] == frameData && binary.BigEndian.Uint32(p[8:]) > 0
}
