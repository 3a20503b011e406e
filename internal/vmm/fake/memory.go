package fake

import (
	"fmt"
	"os"
	"path/filepath"

	"banger/internal/vmm"
	"banger/internal/vmm/fakeguest"
)

// inMemoryFile is the state of a machine whose memory is in its memory file.
const inMemoryFile = "devices"

// readMemory reads what was saved in dir.
func readMemory(dir string) (*fakeguest.Memory, error) {
	text, err := os.ReadFile(filepath.Join(dir, vmm.SavedState))
	if err == nil && string(text) == inMemoryFile {
		text, err = os.ReadFile(filepath.Join(dir, vmm.SavedMemory))
	}
	if err != nil {
		return nil, err
	}
	m, err := fakeguest.Load(text)
	if err != nil {
		return nil, fmt.Errorf("saved memory in %s: %w", dir, err)
	}
	return m, nil
}

// writeMemory saves the memory into dir, or into its memory file.
func writeMemory(m *fakeguest.Memory, dir, memoryFile string) error {
	text, err := m.Save()
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
