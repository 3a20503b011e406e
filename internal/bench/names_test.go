package bench

import (
	"strings"
	"testing"
)

func TestQuestions(t *testing.T) {
	q, err := question(7, "vm1.vm.")
	if err != nil || len(q) != 12+len("\x03vm1\x02vm\x00")+4 || !strings.Contains(string(q), "\x03vm1\x02vm\x00") {
		t.Errorf("%q, %v", q, err)
	}
	if err := answered(q); err == nil {
		t.Error("a question is taken for an answer")
	}
	if err := answered(q[:8]); err == nil {
		t.Error("half a question is taken for an answer")
	}
}
