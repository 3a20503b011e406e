package artifact

import (
	"errors"
	"os"
)

// Sweep removes what builds that died have left. Those at work are not touched.
func (s *Shelf) Sweep() error {
	if _, err := os.Stat(s.dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return s.removeLeftovers()
}
