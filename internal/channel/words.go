package channel

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Words are questions and answers on a stream of their own, without HTTP. A guest that was just restored from memory
// has none of its programs' code at hand: what it need not run to answer is what makes it quick. Such a stream begins
// with WordsPreface; then question follows answer, each a byte, the length of its payload (4 bytes, big-endian), and
// the payload: of a question the byte says which, of an answer it is 0 or the code of a failure.

// WordsPreface begins a stream of words. It is as long as the preface of HTTP/2 (RFC 9113 section 3.4), so that
// whoever knows only that refuses the stream at once.
const WordsPreface = "banger: words, format 1\n"

// MaxWord bounds a payload, bytes.
const MaxWord = 1 << 20

const wordHeader = 5

// WriteWord writes a word in one piece, after prefix.
func WriteWord(w io.Writer, prefix string, kind byte, payload []byte) error {
	b := make([]byte, 0, len(prefix)+wordHeader+len(payload))
	b = append(append(b, prefix...), kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return writeFull(w, append(b, payload...))
}

// ReadWord reads a word. io.EOF says that the stream ended before it began.
func ReadWord(r io.Reader) (kind byte, payload []byte, err error) {
	var header [wordHeader]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	size := binary.BigEndian.Uint32(header[1:])
	if size > MaxWord {
		return 0, nil, fmt.Errorf("a word of %d bytes is longer than %d", size, MaxWord)
	}
	payload = make([]byte, size)
	if _, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, fmt.Errorf("a word is cut off: %w", err)
	}
	return header[0], payload, nil
}

// Which question a word is.
const (
	WordSetTime byte = 1 + iota // SetTimeRequest
	WordAdopt                   // AdoptRequest
)
