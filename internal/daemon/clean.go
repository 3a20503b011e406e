package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/paths"
)

// cleanTimeout bounds the work of clean.
const cleanTimeout = 30 * time.Second

// clean takes away what daemons of this state directory made in the host's network: TAP devices, bridge, rules, and
// that IPv4 is forwarded. It is a Conflict fault while a daemon or a VM runs.
func clean(ctx context.Context, p paths.Paths, stdout, stderr io.Writer) (err error) {
	ctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	if err := p.Make(); err != nil {
		return err
	}
	config, err := loadConfig(p.ConfigFile())
	if err != nil {
		return err
	}
	held, err := takeLock(p)
	if err != nil {
		return fault.Wrap(fault.KindOf(err), err, "nothing was cleaned").WithHint("stop all VMs and the daemon: banger daemon stop --all-vms")
	}
	defer func() { err = errors.Join(err, held.Release()) }()
	network, err := Options{Paths: p}.network(ctx, config, slog.New(slog.NewTextHandler(stderr, nil)))
	if err != nil {
		return err
	}
	c, ok := network.(*hostnet.Client)
	if !ok {
		return nil
	}
	removed, err := c.Clean(ctx)
	for _, thing := range removed {
		fmt.Fprintln(stdout, "removed", thing)
	}
	return errors.Join(err, c.Close())
}
