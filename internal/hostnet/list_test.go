package hostnet

import (
	"fmt"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"

	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

// Devices of others that come and go do not make our questions fail.
func TestListsWhileDevicesComeAndGo(t *testing.T) {
	need.Root(t)
	hosttest.NetNS(t)
	bridge := func(name string) *netlink.Bridge {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		return &netlink.Bridge{LinkAttrs: attrs}
	}
	for i := range 60 { // more than the kernel tells at once
		if err := netlink.LinkAdd(bridge(fmt.Sprintf("fixed%d", i))); err != nil {
			t.Fatal(err)
		}
	}
	here, err := netlink.NewHandle() // it stays in this thread's namespace
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := here.LinkAdd(bridge("churn")); err != nil {
				t.Error(err)
				return
			}
			if err := here.LinkDel(bridge("churn")); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 200 {
		if _, err := ReadRoutes(); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	wg.Wait()
}
