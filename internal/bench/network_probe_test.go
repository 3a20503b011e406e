package bench

import (
	"testing"

	"banger/internal/hosttest"
)

func TestProbe(t *testing.T) {
	hosttest.NetNS(t)
	b := &bench{bin: "/tmp/n2/x/bin", real: &world{root: t.TempDir()}}
	if err := b.taps(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.manyRules(t.Context()); err != nil {
		t.Fatal(err)
	}
}
