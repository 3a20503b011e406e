package agent

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// closing is a file that knows whether it was closed.
type closing struct {
	bytes.Buffer
	closed bool
}

func (c *closing) Close() error { c.closed = true; return nil }

// The guard says that it listens, and goes when all is well; where nothing stands still there is nothing to do for it.
func TestGuardGoes(t *testing.T) {
	for what, said := range map[string]string{"all is well": "\x00", "the agent died, and nothing is held": ""} {
		var ready closing
		if err := guard("none", strings.NewReader(said), &ready); err != nil || ready.Len() != 1 || !ready.closed {
			t.Errorf("%s: %v, said %q", what, err, ready.Bytes())
		}
	}
	broken := errors.New("broken")
	if err := guard("none", failing{broken}, &closing{}); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }
