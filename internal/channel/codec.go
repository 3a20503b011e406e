package channel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
)

const (
	esc       = 0xf7 // never part of UTF-8 text, and rare in yamux headers
	codeESC   = 0x00
	codeReset = 'R'
	codeWord  = 'W'
	nonceSize = 8
	wordHead  = 6 // kind, tag, length
)

// MaxWord bounds the payload of a word, bytes.
const MaxWord = 1 << 20

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

// word is a question or the answer to one.
type word struct {
	kind    byte // which question; of an answer 0 or the code of a failure
	tag     byte // of a question and its answer the same
	payload []byte
}

// bytes are those of the word on the pipe.
func (w word) bytes() []byte {
	head := binary.BigEndian.AppendUint32([]byte{w.kind, w.tag}, uint32(len(w.payload)))
	return stuff(stuff([]byte{esc, codeWord}, head), w.payload)
}

// decoder undoes stuff. Payload goes to data, resets to reset, words to word, and bytes that no encoder writes
// to garbled; each of them may end the decoding by an error.
type decoder struct {
	data    func([]byte) error
	reset   func(nonce) error
	word    func(word) error // nil: it is garbled
	garbled func() error

	escaped bool
	buf     []byte
	in      byte   // the code of a reset or word whose bytes are being collected, or 0
	want    int    // of how many bytes
	frame   []byte // those that have come
}

// write decodes p, which may be cut anywhere.
func (d *decoder) write(p []byte) error {
	d.buf = d.buf[:0]
	for len(p) > 0 {
		if n := d.plain(p); n > 0 {
			d.buf, p = append(d.buf, p[:n]...), p[n:]
			continue
		}
		if err := d.step(p[0]); err != nil {
			return err
		}
		p = p[1:]
	}
	return d.flush()
}

// plain returns how many bytes at the beginning of p are payload as they are.
func (d *decoder) plain(p []byte) int {
	if d.escaped || d.in != 0 {
		return 0
	}
	if i := bytes.IndexByte(p, esc); i >= 0 {
		return i
	}
	return len(p)
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
	switch {
	case b == codeESC:
		return d.literal(esc)
	case b == codeReset:
		return d.collect(b, nonceSize)
	case b == codeWord && d.word != nil:
		return d.collect(b, wordHead)
	}
	return d.spoilt()
}

// collect begins a reset or a word, of which so many bytes come first.
func (d *decoder) collect(code byte, want int) error {
	d.in, d.want, d.frame = code, want, nil
	return d.flush()
}

func (d *decoder) spoilt() error {
	d.in = 0
	if err := d.flush(); err != nil {
		return err
	}
	return d.garbled()
}

func (d *decoder) literal(b byte) error {
	if d.in == 0 {
		d.buf = append(d.buf, b)
		return nil
	}
	d.frame = append(d.frame, b)
	if len(d.frame) < d.want {
		return nil
	}
	if d.in == codeReset {
		d.in = 0
		return d.reset(nonce(d.frame))
	}
	if d.want == wordHead {
		size := binary.BigEndian.Uint32(d.frame[2:])
		if size > MaxWord {
			return d.spoilt()
		}
		if d.want += int(size); size > 0 {
			return nil
		}
	}
	d.in = 0
	return d.word(word{d.frame[0], d.frame[1], d.frame[wordHead:]})
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
