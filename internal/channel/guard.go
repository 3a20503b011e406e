package channel

import (
	"encoding/binary"
	"errors"
	"io"
)

// Of a yamux frame's header: version, type, flags (2 bytes), stream (4), length (4); yamux's spec.md.
const (
	frameHeader = 12
	frameData   = 0
	flagSYN     = 1
)

var errUnasked = errors.New("the guest said what it was not asked")

// guard lets through what a guest's session sends, and ends at what only a hostile one would: streams of its
// own, of which nobody takes the data, and pings, for each of which yamux starts a goroutine that lives
// until the answer is written, so that a guest which does not read could fill the host's memory.
type guard struct {
	r      io.Reader
	header [frameHeader]byte
	have   int    // bytes of header
	body   uint32 // bytes of the frame's body that are still to come
}

func (g *guard) Read(p []byte) (int, error) {
	n, err := g.r.Read(p)
	if bad := g.inspect(p[:n]); bad != nil {
		return 0, bad
	}
	return n, err
}

func (g *guard) inspect(p []byte) error {
	for len(p) > 0 {
		if g.body > 0 {
			skip := min(len(p), int(g.body))
			g.body -= uint32(skip)
			p = p[skip:]
			continue
		}
		n := copy(g.header[g.have:], p)
		g.have, p = g.have+n, p[n:]
		if g.have < frameHeader {
			return nil
		}
		g.have = 0
		if binary.BigEndian.Uint16(g.header[2:])&flagSYN != 0 {
			return errUnasked
		}
		if g.header[1] == frameData {
			g.body = binary.BigEndian.Uint32(g.header[8:])
		}
	}
	return nil
}
