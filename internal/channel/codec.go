package channel

import (
	"bytes"
	"errors"
	"io"
)

const (
	esc       = 0xf7 // never part of UTF-8 text, and rare in yamux headers
	codeESC   = 0x00
	codeReset = 'R'
	nonceSize = 8
)

type nonce [nonceSize]byte

// noSession is the nonce of a guest that has no session.
var noSession nonce

var errGarbled = errors.New("garbled byte stream")

// stuff appends p to dst with every ESC byte escaped.
func stuff(dst, p []byte) []byte {
	for {
		i := bytes.IndexByte(p, esc)
		if i < 0 {
			return append(dst, p...)
		}
		dst = append(append(dst, p[:i]...), esc, codeESC)
		p = p[i+1:]
	}
}

// reset returns the bytes of a reset.
func reset(n nonce) []byte {
	return stuff([]byte{esc, codeReset}, n[:])
}

// decoder undoes stuff. Payload goes to data, resets to reset, and bytes that no encoder writes
// to garbled; each of them may end the decoding by an error.
type decoder struct {
	data    func([]byte) error
	reset   func(nonce) error
	garbled func() error

	escaped bool
	inNonce bool
	have    int
	nonce   nonce
	buf     []byte
}

// write decodes p, which may be cut anywhere.
func (d *decoder) write(p []byte) error {
	d.buf = d.buf[:0]
	for _, b := range p {
		if err := d.step(b); err != nil {
			return err
		}
	}
	return d.flush()
}

func (d *decoder) step(b byte) error {
	switch {
	case !d.escaped && b == esc:
		d.escaped = true
		return nil
	case !d.escaped:
		return d.literal(b)
	case b == esc:
		return nil
	}
	d.escaped = false
	switch b {
	case codeESC:
		return d.literal(esc)
	case codeReset:
		d.inNonce, d.have = true, 0
		return d.flush()
	}
	d.inNonce = false
	if err := d.flush(); err != nil {
		return err
	}
	return d.garbled()
}

func (d *decoder) literal(b byte) error {
	if !d.inNonce {
		d.buf = append(d.buf, b)
		return nil
	}
	d.nonce[d.have] = b
	d.have++
	if d.have < nonceSize {
		return nil
	}
	d.inNonce = false
	return d.reset(d.nonce)
}

func (d *decoder) flush() error {
	if len(d.buf) == 0 {
		return nil
	}
	err := d.data(d.buf)
	d.buf = d.buf[:0]
	return err
}

// writeFull writes p whole; some ports write less without an error.
func writeFull(w io.Writer, p []byte) error {
	for len(p) > 0 {
		n, err := w.Write(p)
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		p = p[n:]
	}
	return nil
}
