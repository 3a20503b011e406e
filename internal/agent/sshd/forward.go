package sshd

import (
	"context"
	"io"
	"net"
	"strconv"
	"sync"

	"golang.org/x/crypto/ssh"
)

// maxForwards bounds the ports one client has us listen on.
const maxForwards = 64

// address is how SSH names an end of a connection (RFC 4254, 7).
type address struct {
	Host string
	Port uint32
}

func (a address) String() string { return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port))) }

// direct connects the client to where it wants, from here.
func (c *connected) direct(ctx context.Context, asked ssh.NewChannel) {
	var v struct{ To, From address }
	if err := unmarshalPair(asked.ExtraData(), &v.To, &v.From); err != nil {
		_ = asked.Reject(ssh.ConnectionFailed, "malformed request")
		return
	}
	conn, err := (&net.Dialer{Timeout: handshakeTimeout}).DialContext(ctx, "tcp", v.To.String())
	if err != nil {
		_ = asked.Reject(ssh.ConnectionFailed, err.Error())
		return
	}
	channel, requests, err := asked.Accept()
	if err != nil {
		_ = conn.Close()
		return
	}
	go ssh.DiscardRequests(requests) // ends with the channel
	join(ctx, conn, channel)
}

func unmarshalPair(data []byte, a, b *address) error {
	var v struct {
		HostA string
		PortA uint32
		HostB string
		PortB uint32
	}
	err := ssh.Unmarshal(data, &v)
	*a, *b = address{v.HostA, v.PortA}, address{v.HostB, v.PortB}
	return err
}

// join copies both ways until both ends are done, or ctx ends.
func join(ctx context.Context, conn net.Conn, channel ssh.Channel) {
	closeBoth := func() {
		_ = conn.Close()
		_ = channel.Close()
	}
	defer closeBoth()
	defer context.AfterFunc(ctx, closeBoth)()
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(channel, conn) // an end that breaks ends the other
		_ = channel.CloseWrite()
	})
	both.Go(func() {
		_, _ = io.Copy(conn, channel)
		if half, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = half.CloseWrite()
		}
	})
	both.Wait()
}

// global serves the requests of the connection itself: ports to listen on here. What came to them ends with ctx.
func (c *connected) global(ctx context.Context, requests <-chan *ssh.Request) {
	for r := range requests {
		ok, answer := false, []byte(nil)
		var a address
		if ssh.Unmarshal(r.Payload, &a) == nil {
			switch r.Type {
			case "tcpip-forward":
				ok, answer = c.listen(ctx, a)
			case "cancel-tcpip-forward":
				ok = c.unlisten(a)
			}
		}
		if r.WantReply {
			_ = r.Reply(ok, answer) // a client that is gone ends the loop
		}
	}
}

// listen listens for the client; the answer names the port when the client left it to us.
func (c *connected) listen(ctx context.Context, a address) (bool, []byte) {
	host := a.Host
	if host == "localhost" {
		host = "127.0.0.1"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.forwards) >= maxForwards || c.forwards[a.String()] != nil {
		return false, nil
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(int(a.Port))))
	if err != nil {
		return false, nil
	}
	var answer []byte
	if a.Port == 0 {
		a.Port = uint32(l.Addr().(*net.TCPAddr).Port)
		answer = ssh.Marshal(struct{ Port uint32 }{a.Port})
	}
	c.forwards[a.String()] = l
	go c.accept(ctx, l, a) // ends when l is closed
	return true, answer
}

func (c *connected) accept(ctx context.Context, l net.Listener, a address) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go c.forwarded(ctx, conn, a) // ends with the connection, or the client
	}
}

// forwarded hands a connection that came here to the client.
func (c *connected) forwarded(ctx context.Context, conn net.Conn, a address) {
	from, _ := conn.RemoteAddr().(*net.TCPAddr)
	channel, requests, err := c.client.OpenChannel("forwarded-tcpip", ssh.Marshal(struct {
		Host     string
		Port     uint32
		FromHost string
		FromPort uint32
	}{a.Host, a.Port, from.IP.String(), uint32(from.Port)}))
	if err != nil {
		_ = conn.Close()
		return
	}
	go ssh.DiscardRequests(requests) // ends with the channel
	join(ctx, conn, channel)
}

func (c *connected) unlisten(a address) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.forwards[a.String()]
	if l == nil {
		return false
	}
	delete(c.forwards, a.String())
	return l.Close() == nil
}

func (c *connected) stopForwarding() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.forwards {
		_ = l.Close()
	}
}
