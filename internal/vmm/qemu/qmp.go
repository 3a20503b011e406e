package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
)

// Bounds of the monitor protocol.
const (
	qmpTimeout = 5 * time.Second // of one call
	qmpMessage = 1 << 20         // bytes of one message

	lateAnswers = 16 // answers to calls that were given up, before the connection is
)

// monitor is a client of QEMU's machine protocol (QMP): JSON objects, one a line. One call is under
// way at a time. An answer that is not understood ends the connection.
type monitor struct {
	conn    net.Conn
	turn    chan struct{} // holds one token: the right to call
	replies chan qmpMsg
	done    chan struct{} // closed when the reader has ended
	err     error         // why; valid once done is closed

	mu       sync.Mutex
	shutdown string // reason of the last SHUTDOWN event
	id       uint64
}

type qmpMsg struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       uint64          `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	Data  struct {
		Guest  bool   `json:"guest"`
		Reason string `json:"reason"`
	} `json:"data"`
}

// newMonitor greets QEMU on conn, which is the monitor's from now on. It returns when QEMU's main loop
// answers, that is, when the machine is made.
func newMonitor(ctx context.Context, conn net.Conn) (*monitor, error) {
	m := &monitor{
		conn: conn, turn: make(chan struct{}, 1), replies: make(chan qmpMsg, lateAnswers), done: make(chan struct{}),
	}
	m.turn <- struct{}{}
	greeted := make(chan struct{})
	go m.read(greeted)
	select {
	case <-greeted:
	case <-m.done:
	case <-ctx.Done():
		m.close()
		return nil, fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err(), "QEMU's monitor does not greet")
	}
	// It is answered once the machine is made, for which there is more time than for a call to one that is.
	if err := m.call(ctx, command{name: "qmp_capabilities", most: startTimeout}, nil); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

// read hands on what QEMU says until the connection ends.
func (m *monitor) read(greeted chan<- struct{}) {
	defer close(m.done)
	defer m.conn.Close()
	lines := bufio.NewScanner(m.conn)
	lines.Buffer(make([]byte, 0, 4<<10), qmpMessage)
	for lines.Scan() {
		var msg qmpMsg
		if err := json.Unmarshal(lines.Bytes(), &msg); err != nil {
			m.err = fmt.Errorf("it is not understood: %w", err)
			return
		}
		switch {
		case msg.Greeting != nil:
			if greeted != nil {
				close(greeted)
				greeted = nil
			}
		case msg.Event == "SHUTDOWN":
			m.mu.Lock()
			m.shutdown = msg.Data.Reason
			m.mu.Unlock()
		case msg.Event != "":
		case msg.Return != nil || msg.Error != nil:
			select {
			case m.replies <- msg:
			default:
				m.err = errors.New("it answers what nobody asked")
				return
			}
		}
	}
	if m.err = lines.Err(); m.err == nil {
		m.err = errors.New("it has hung up")
	}
}

// command is one request to QEMU.
type command struct {
	name string
	args any           // nil: none
	file *os.File      // handed over with it; nil: none
	most time.Duration // until the answer; 0: qmpTimeout
}

// callFor runs a command without arguments and decodes its answer into result, unless that is nil.
func (m *monitor) callFor(ctx context.Context, name string, result any) error {
	return m.call(ctx, command{name: name}, result)
}

// call runs a command and decodes its answer into result, unless that is nil.
func (m *monitor) call(ctx context.Context, c command, result any) error {
	if c.most == 0 {
		c.most = qmpTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, c.most)
	defer cancel()
	select {
	case <-m.turn:
		defer func() { m.turn <- struct{}{} }()
	case <-ctx.Done():
		return m.failed(c.name, ctx.Err())
	case <-m.done:
		return m.failed(c.name, m.err)
	}
	m.id++
	err := m.send(ctx, c, m.id)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = context.DeadlineExceeded
	}
	if err != nil {
		return m.failed(c.name, err)
	}
	return m.await(ctx, c.name, m.id, result)
}

// send writes one request.
func (m *monitor) send(ctx context.Context, c command, id uint64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	request := map[string]any{"execute": c.name, "id": id}
	if c.args != nil {
		request["arguments"] = c.args
	}
	text, err := json.Marshal(request)
	if err != nil {
		return err
	}
	deadline, _ := ctx.Deadline()
	if err := m.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	text = append(text, '\n')
	if c.file == nil {
		_, err = m.conn.Write(text)
		return err
	}
	conn, ok := m.conn.(*net.UnixConn)
	if !ok {
		return errors.New("files cannot be handed over on this connection")
	}
	// A request is shorter than the socket's buffer: it goes out whole, with the descriptor.
	_, _, err = conn.WriteMsgUnix(text, unix.UnixRights(int(c.file.Fd())), nil)
	return err
}

// await waits for the answer to request id.
func (m *monitor) await(ctx context.Context, name string, id uint64, result any) error {
	for {
		select {
		case msg := <-m.replies:
			if msg.ID != id {
				continue // the late answer to a call that was given up
			}
			return m.answer(name, msg, result)
		case <-m.done:
			return m.failed(name, m.err)
		case <-ctx.Done():
			return m.failed(name, ctx.Err())
		}
	}
}

func (m *monitor) answer(command string, msg qmpMsg, result any) error {
	if msg.Error != nil {
		return m.failed(command, fmt.Errorf("%s (%s)", msg.Error.Desc, msg.Error.Class))
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(msg.Return, result); err != nil {
		return m.failed(command, err)
	}
	return nil
}

func (m *monitor) failed(command string, err error) error {
	return fault.Wrap(fault.KindOf(err), err, "QEMU's monitor: %s", command)
}

// shutdownReason is what QEMU said about its end, or "".
func (m *monitor) shutdownReason() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.shutdown
}

// close hangs up and waits for the reader.
func (m *monitor) close() {
	_ = m.conn.Close() // the reader may have closed it
	<-m.done
}
