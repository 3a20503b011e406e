package server

import (
	"context"

	"banger/internal/fault"
)

// Gate holds calls back until the engine has looked after the VMs of the daemon's predecessor.
type Gate struct{ opened chan struct{} }

// NewGate returns a closed gate.
func NewGate() *Gate { return &Gate{opened: make(chan struct{})} }

// Open lets the calls go on. It is called once.
func (g *Gate) Open() { close(g.opened) }

// wait returns when the gate is open. A nil gate always is.
func (g *Gate) wait(ctx context.Context) error {
	if g == nil {
		return nil
	}
	select {
	case <-g.opened:
		return nil
	case <-ctx.Done():
		return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err(), "the daemon is still looking after the VMs of its predecessor")
	}
}

// isOpen tells whether calls can be served.
func (g *Gate) isOpen() bool {
	if g == nil {
		return true
	}
	select {
	case <-g.opened:
		return true
	default:
		return false
	}
}
