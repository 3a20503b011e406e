package vm

import (
	"strings"
	"testing"

	"banger/internal/fault"
)

func TestCheckTag(t *testing.T) {
	for _, tag := range []string{"a", "0", "20260301-120000", "before-upgrade", "web", strings.Repeat("x", 63)} {
		if err := CheckTag(tag); err != nil {
			t.Errorf("%s: %v", tag, err)
		}
	}
	for _, tag := range []string{
		"", ".", "..", "../x", "a/b", ".new-a", "A", "a_b", "a b", "-a", "a-", "a@b", "é", "a\n", "a\x00", strings.Repeat("x", 64), strings.Repeat("x", 1<<20),
	} {
		if err := CheckTag(tag); fault.KindOf(err) != fault.Usage || len(err.Error()) > 300 {
			t.Errorf("%.80q: %v", tag, err)
		}
	}
}
