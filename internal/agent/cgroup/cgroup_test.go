package cgroup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestOwn(t *testing.T) {
	if got := groupIn("1:cpu:/x\n0::/system.slice/banger-agent.service\n"); got != "/system.slice/banger-agent.service" {
		t.Errorf("got %q", got)
	}
	if got := groupIn("1:cpu:/x\n"); got != "" {
		t.Errorf("got %q", got)
	}
}

// tree makes what a kernel shows of groups; those named in frozen say that they stand still.
func tree(t *testing.T, groups []string, frozen ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, group := range groups {
		dir := filepath.Join(root, group)
		events := "populated 1\nfrozen 0\n"
		if slices.Contains(frozen, group) {
			events = "populated 1\nfrozen 1\n"
		}
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "cgroup.events"), []byte(events), 0o644),
			os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func stands(t *testing.T, root, group string) bool {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, group, "cgroup.freeze"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b) == "1"
}

func TestEverybodyElseIsFrozen(t *testing.T) {
	groups := []string{"init.scope", "user.slice", "user.slice/one", "system.slice", "system.slice/ssh.service", "system.slice/agent.service", "system.slice/agent.service/programs"}
	others := []string{"init.scope", "user.slice", "system.slice/ssh.service", "system.slice/agent.service/programs"}
	root := tree(t, groups, others...)
	frozen, err := freeze(t.Context(), root, "/system.slice/agent.service", func(string) error { return nil })
	if err != nil || len(frozen) != len(others) {
		t.Fatalf("got %v, %v", frozen, err)
	}
	for _, group := range groups {
		if want := slices.Contains(others, group); stands(t, root, group) != want {
			t.Errorf("%s: stands still %v, want %v", group, !want, want)
		}
	}
	if err := os.RemoveAll(filepath.Join(root, "user.slice")); err != nil { // it ended meanwhile
		t.Fatal(err)
	}
	if err := thawAll(frozen); err != nil {
		t.Fatal(err)
	}
	if stands(t, root, "init.scope") || stands(t, root, "system.slice/ssh.service") {
		t.Error("somebody still stands still")
	}
}

func TestFreezeThatDoesNotEnd(t *testing.T) {
	root := tree(t, []string{"init.scope", "stuck.slice", "agent"}, "init.scope")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	frozen, err := freeze(ctx, root, "/agent", func(string) error { return nil })
	if !errors.Is(err, context.DeadlineExceeded) || frozen != nil {
		t.Errorf("got %v, %v", frozen, err)
	}
	if stands(t, root, "init.scope") || stands(t, root, "stuck.slice") {
		t.Error("somebody was left standing still")
	}
}

// What the user has frozen stays so.
func TestThoseWhoStoodStillBeforeAreLeftSo(t *testing.T) {
	root := tree(t, []string{"paused.slice", "other.slice", "agent"}, "paused.slice", "other.slice")
	if err := os.WriteFile(filepath.Join(root, "paused.slice/cgroup.freeze"), []byte("1"), 0o644); err != nil {
		t.Fatal(err)
	}
	var noted []string
	frozen, err := freeze(t.Context(), root, "/agent", func(group string) error { noted = append(noted, group); return nil })
	if !slices.Equal(noted, []string{"/other.slice"}) {
		t.Errorf("noted %v", noted)
	}
	if err != nil || !stands(t, root, "other.slice") {
		t.Fatalf("got %v, %v", frozen, err)
	}
	if err := thawAll(frozen); err != nil {
		t.Fatal(err)
	}
	if !stands(t, root, "paused.slice") || stands(t, root, "other.slice") {
		t.Error("the user's group was let go, or the other was not")
	}
}

// A group that is made while others are frozen is frozen as well.
func TestGroupsThatComeMeanwhile(t *testing.T) {
	groups := []string{"init.scope", "agent"}
	root := tree(t, groups)
	late := tree(t, []string{"late.slice"}, "late.slice")
	go func() { // the first process starts it, and then stands still
		for !stands(t, root, "init.scope") {
			time.Sleep(time.Millisecond)
		}
		events := filepath.Join(root, "init.scope/cgroup.events")
		if err := errors.Join(os.Rename(filepath.Join(late, "late.slice"), filepath.Join(root, "late.slice")),
			os.WriteFile(events, []byte("frozen 1\n"), 0o644)); err != nil {
			t.Error(err)
		}
	}()
	frozen, err := freeze(t.Context(), root, "/agent", func(string) error { return nil })
	if err != nil || len(frozen) != 2 || !stands(t, root, "late.slice") {
		t.Errorf("got %v, %v", frozen, err)
	}
}

func TestAgentInTheRootGroup(t *testing.T) {
	root := tree(t, []string{"programs", "other"}, "programs", "other")
	if groups, err := beside(root, "/"); err != nil || len(groups) != 2 {
		t.Errorf("got %v, %v", groups, err)
	}
}
