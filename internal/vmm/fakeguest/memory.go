// Package fakeguest is the inside of machines that are ordinary processes: the memory of a guest, the programs in
// it, and an agent that is the guest's own service. The fake VMMs share it.
package fakeguest

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"

	agentv1 "banger/api/agent/v1"
)

// Memory is what a guest has in memory: gone with a stop, kept by a save.
type Memory struct {
	mu       sync.Mutex
	BootID   string          `json:"boot_id"`
	Cmdline  []string        `json:"cmdline"`
	Hostname string          `json:"hostname"`
	Counted  int             `json:"counted"`
	Identity json.RawMessage `json:"identity,omitempty"` // the GuestConfig it was given last
}

// NewMemory is that of a guest called name that boots with these kernel arguments.
func NewMemory(name string, cmdline []string) (*Memory, error) {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil { // not from /proc: a machine may be confined to its files
		return nil, err
	}
	text := fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	return &Memory{BootID: text, Cmdline: cmdline, Hostname: name}, nil
}

// Load returns the memory that Save wrote.
func Load(text []byte) (*Memory, error) {
	m := &Memory{}
	if err := json.Unmarshal(text, m); err != nil {
		return nil, err
	}
	return m, nil
}

// Save returns the memory as one line of JSON.
func (m *Memory) Save() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return json.Marshal(m)
}

// Name is the guest's host name.
func (m *Memory) Name() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.Hostname
}

func (m *Memory) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Counted++
	return m.Counted
}

func (m *Memory) identity() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return string(m.Identity)
}

// adopt remembers who the guest is now.
func (m *Memory) adopt(r *agentv1.AdoptRequest) error {
	if r.GetIdentity() == nil {
		return nil
	}
	text, err := protojson.Marshal(r.GetIdentity())
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Hostname, m.Identity = r.GetIdentity().GetHostname(), text
	return nil
}

// Clock holds up a paused guest.
type Clock struct {
	mu     sync.Mutex
	moves  *sync.Cond
	paused bool
}

// NewClock returns one that runs.
func NewClock() *Clock {
	c := &Clock{}
	c.moves = sync.NewCond(&c.mu)
	return c
}

// Set pauses the guest or lets it go on.
func (c *Clock) Set(paused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused = paused
	c.moves.Broadcast()
}

// Stands tells whether the guest is paused.
func (c *Clock) Stands() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.paused
}

// Wait returns as soon as the guest is not paused.
func (c *Clock) Wait() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.paused {
		c.moves.Wait()
	}
}
