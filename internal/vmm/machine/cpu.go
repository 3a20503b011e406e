package machine

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
)

// HostCPU is a hash of the processor that a guest on KVM sees: a guest that has found a feature goes on using
// it. In software every host is the same.
func HostCPU(accelerator string) string {
	if accelerator != "kvm" {
		return ""
	}
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	first, _, _ := bytes.Cut(text, []byte("\n\n"))
	sum := sha256.New()
	for line := range bytes.Lines(first) {
		name, _, _ := bytes.Cut(line, []byte(":"))
		switch string(bytes.TrimSpace(name)) {
		case "vendor_id", "model name", "stepping", "microcode", "flags", "CPU implementer", "CPU part", "Features":
			sum.Write(line)
		}
	}
	return hex.EncodeToString(sum.Sum(nil)[:8])
}
