package bench

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"banger/internal/hostnet"
	"banger/internal/vm"
)

// What is measured of the host's network, by the daemon's own client of the helper.
const (
	tapRounds   = 20
	manyGuests  = 500
	natRounds   = 10
	natLimit    = 0.1 // seconds for the rules of manyGuests
	benchBridge = "banger98"
)

// network is a client on a bridge of its own, for as long as the function runs. Guests that prepare attaches are taken
// up all at once, like those that an earlier daemon left.
func (b *bench) network(ctx context.Context, pool int, prepare, f func(*hostnet.Client) error) (err error) {
	c, err := hostnet.Start(ctx, hostnet.Options{
		HelperPath: filepath.Join(b.bin, "banger-nethelper"), HelperLog: filepath.Join(b.real.root, "nethelper.log"),
		Bridge: benchBridge, Instance: "bench", Pool: pool,
	})
	if err != nil {
		return err
	}
	defer func() {
		if _, cleanErr := c.Clean(ctx); err == nil {
			err = cleanErr
		}
		if closeErr := c.Close(); err == nil {
			err = closeErr
		}
	}()
	if _, err := c.EnsureBridge(ctx); err != nil {
		return err
	}
	if prepare != nil {
		if err := prepare(c); err != nil {
			return err
		}
	}
	if _, err := c.Settle(ctx, nil); err != nil {
		return err
	}
	return f(c)
}

// taps compares the network stage of a VM that gets a device which waited with that of one whose device is made then.
func (b *bench) taps(ctx context.Context) error {
	attach := func(c *hostnet.Client) (took []float64, err error) {
		for i := range tapRounds {
			if err := awaitPool(ctx, c); err != nil {
				return nil, err
			}
			id, g, err := benchGuest(c, i)
			if err != nil {
				return nil, err
			}
			s, err := seconds(func() error { _, err := c.Attach(ctx, id, g); return err })
			if err != nil {
				return nil, err
			}
			took = append(took, s)
			if err := c.Detach(ctx, id); err != nil {
				return nil, err
			}
		}
		return took, nil
	}
	var fresh, waiting []float64
	for pool, to := range map[int]*[]float64{0: &fresh, 4: &waiting} {
		err := b.network(ctx, pool, nil, func(c *hostnet.Client) (err error) { *to, err = attach(c); return err })
		if err != nil {
			return err
		}
	}
	base := b.add(measured("network of a VM, TAP device made fresh", "s", 0, fresh...))
	b.add(measured("network of a VM, TAP device from the pool", "s", 0, waiting...).against(base, 1))
	return nil
}

// awaitPool waits until the devices that are to wait do.
func awaitPool(ctx context.Context, c *hostnet.Client) error {
	for {
		if s := c.Status(); s.Ready == s.Wanted {
			return nil
		}
		if err := rest(ctx, time.Millisecond); err != nil {
			return err
		}
	}
}

// benchGuest is a guest with NAT on the bridge's subnet.
func benchGuest(c *hostnet.Client, i int) (vm.ID, hostnet.Guest, error) {
	address, err := c.EnsureBridge(context.Background())
	if err != nil {
		return "", hostnet.Guest{}, err
	}
	base := address.Masked().Addr().As4()
	id := vm.ID(fmt.Sprintf("%08x", i))
	return id, hostnet.Guest{MAC: hostnet.MAC(id), IP: netip.AddrFrom4([4]byte{base[0], base[1], byte(1 + i/200), byte(2 + i%200)}), NAT: true}, nil
}

// manyRules measures how long it takes until the rules of many guests hold, when one of them is switched.
func (b *bench) manyRules(ctx context.Context) error {
	var last vm.ID
	var guest hostnet.Guest
	attach := func(c *hostnet.Client) error {
		for i := range manyGuests {
			id, g, err := benchGuest(c, i)
			if err != nil {
				return err
			}
			if _, err := c.Attach(ctx, id, g); err != nil {
				return err
			}
			last, guest = id, g
		}
		return nil
	}
	return b.network(ctx, 0, attach, func(c *hostnet.Client) error {
		var took []float64
		for range natRounds {
			guest.NAT = !guest.NAT
			s, err := seconds(func() error { _, err := c.Attach(ctx, last, guest); return err })
			if err != nil {
				return err
			}
			took = append(took, s)
		}
		b.add(measured(fmt.Sprintf("NAT switched with %d VMs", manyGuests), "s", natLimit, took...))
		return nil
	})
}
