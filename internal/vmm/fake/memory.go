package fake

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"

	agentv1 "banger/api/agent/v1"
	"banger/internal/vmm"
)

// memory is what a guest has in memory: gone with a stop, kept by a save.
type memory struct {
	mu       sync.Mutex
	BootID   string          `json:"boot_id"`
	Cmdline  []string        `json:"cmdline"`
	Hostname string          `json:"hostname"`
	Counted  int             `json:"counted"`
	Identity json.RawMessage `json:"identity,omitempty"` // the GuestConfig it was given last
}

func newMemory(name string, cmdline []string) (*memory, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		return nil, err
	}
	return &memory{BootID: strings.TrimSpace(string(id)), Cmdline: cmdline, Hostname: name}, nil
}

// inMemoryFile is the state of a machine whose memory is in its memory file.
const inMemoryFile = "devices"

// readMemory reads what was saved in dir.
func readMemory(dir string) (*memory, error) {
	text, err := os.ReadFile(filepath.Join(dir, vmm.SavedState))
	if err == nil && string(text) == inMemoryFile {
		text, err = os.ReadFile(filepath.Join(dir, vmm.SavedMemory))
	}
	if err != nil {
		return nil, err
	}
	m := &memory{}
	if err := json.Unmarshal(text, m); err != nil {
		return nil, fmt.Errorf("saved memory in %s: %w", dir, err)
	}
	return m, nil
}

// write saves the memory into dir, or into its memory file.
func (m *memory) write(dir, memoryFile string) error {
	m.mu.Lock()
	text, err := json.Marshal(m)
	m.mu.Unlock()
	if err != nil {
		return err
	}
	if memoryFile != "" {
		if err := os.WriteFile(memoryFile, text, 0o600); err != nil {
			return err
		}
		text = []byte(inMemoryFile)
	}
	return os.WriteFile(filepath.Join(dir, vmm.SavedState), text, 0o600)
}

func (m *memory) hostname() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.Hostname
}

func (m *memory) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Counted++
	return m.Counted
}

func (m *memory) identity() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return string(m.Identity)
}

// adopt remembers who the guest is now.
func (m *memory) adopt(r *agentv1.AdoptRequest) error {
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

// clock holds up a paused guest.
type clock struct {
	mu     sync.Mutex
	moves  *sync.Cond
	paused bool
}

func newClock() *clock {
	c := &clock{}
	c.moves = sync.NewCond(&c.mu)
	return c
}

// set pauses the guest or lets it go on.
func (c *clock) set(paused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused = paused
	c.moves.Broadcast()
}

// stands tells whether the guest is paused.
func (c *clock) stands() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.paused
}

// wait returns as soon as the guest is not paused.
func (c *clock) wait() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.paused {
		c.moves.Wait()
	}
}
