package hostnet

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// listTries is how often a list is asked for that changed while the kernel was telling it.
const listTries = 20

// List asks the kernel for a list again when devices, addresses or routes came or went while it was told:
// another VM's, or a container's.
func List[T any](ask func() ([]T, error)) (list []T, err error) {
	for range listTries {
		if list, err = ask(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return list, err
}
