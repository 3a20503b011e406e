package builder

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"banger/api/agent/v1/agentv1connect"
	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/vm"
)

// house has machines that never boot, and a shelf of images without files: for what happens around the VM.
type house struct {
	mu       sync.Mutex
	vms      map[string]vm.Spec
	images   map[string]image.Image
	said     []string
	bootFail error
	baseFail error
	state    vm.State // of all VMs
	// deleteFail is why VMs cannot be deleted.
	deleteFail error
	agent      agentv1connect.AgentServiceClient // of all VMs
}

func (h *house) Create(_ context.Context, spec vm.Spec, _ bool, _ progress.Sink) (vm.VM, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bootFail != nil {
		return vm.VM{}, h.bootFail
	}
	h.vms[spec.Name] = spec
	return vm.VM{ID: "00000000", Spec: spec}, nil
}

func (h *house) List(context.Context) (all []vm.VM, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, spec := range h.vms {
		spec.Name = name
		all = append(all, vm.VM{Spec: spec, State: h.state})
	}
	return all, nil
}

func (h *house) Delete(_ context.Context, ref string, _ bool, _ progress.Sink) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.vms[ref]; !ok {
		return fault.New(fault.NotFound, "no VM %s", ref)
	}
	if h.deleteFail != nil {
		return h.deleteFail
	}
	delete(h.vms, ref)
	return nil
}

func (h *house) Agent(context.Context, string) (agentv1connect.AgentServiceClient, error) {
	return h.agent, nil
}

type shelf struct{ *house }

func (s shelf) Get(_ context.Context, name string) (image.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.images[name]
	if !ok {
		return i, fault.New(fault.NotFound, "no image %s", name)
	}
	return i, nil
}

func (s shelf) Free(name string) error {
	if _, err := s.Get(context.Background(), name); err == nil {
		return fault.New(fault.Conflict, "there is an image %q already", name)
	}
	return nil
}

func (s shelf) BootstrapBase(_ context.Context, o image.BaseOptions, _ progress.Sink) (image.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.baseFail != nil {
		return image.Image{}, s.baseFail
	}
	s.said = append(s.said, "bootstrap "+o.Suite+" with "+strings.Join(o.Packages, " "))
	s.images[o.Name] = image.Image{Name: o.Name}
	return s.images[o.Name], nil
}

func (s shelf) Build(context.Context, image.BuildOptions, progress.Sink) (image.Image, error) {
	return image.Image{}, errors.New("nothing is exported here")
}

func (s shelf) Delete(_ context.Context, name string, _ func(string) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.images[name]; !ok {
		return fault.New(fault.NotFound, "no image %s", name)
	}
	delete(s.images, name)
	return nil
}

func newHouse(t *testing.T) (*house, *Builder) {
	h := &house{vms: map[string]vm.Spec{}, images: map[string]image.Image{"there": {Name: "there", Digest: "sha256:1"}}}
	return h, New(Options{
		Machines: h, Images: shelf{h}, Paths: paths.Under(t.TempDir()), Kernel: func(context.Context) (string, error) { return "k", nil },
	})
}

// left returns what a build left beside its logs.
func (h *house) left(t *testing.T, b *Builder) []string {
	t.Helper()
	entries, err := os.ReadDir(b.o.Paths.Builds())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		if filepath.Ext(e.Name()) != logSuffix {
			left = append(left, e.Name())
		}
	}
	for name := range h.images {
		if name != "there" {
			left = append(left, "image "+name)
		}
	}
	for name := range h.vms {
		left = append(left, "VM "+name)
	}
	return left
}

// TestNothingIsLeft: wherever a build ends, all of it is taken back, and the error tells where its log is.
func TestNothingIsLeft(t *testing.T) {
	onDebian := recipe(t, "from = \"debian:forky\"\npackages = [\"git\"]\n")
	for name, c := range map[string]struct {
		request Request
		break_  func(*house)
		kind    fault.Kind
	}{
		"no base":       {Request{Recipe: onDebian}, func(h *house) { h.baseFail = fault.New(fault.Precondition, "no room for the image") }, fault.Precondition},
		"no VM":         {Request{Recipe: onDebian}, func(h *house) { h.bootFail = fault.New(fault.Timeout, "it did not boot") }, fault.Timeout},
		"no host key":   {Request{Recipe: onDebian}, func(*house) {}, fault.Precondition},
		"base is gone":  {Request{Recipe: recipe(t, "from = \"image:gone\"\n")}, func(*house) {}, fault.NotFound},
		"other base":    {Request{Recipe: recipe(t, "from = \"image:there@sha256:2\"\n")}, func(*house) {}, fault.Conflict},
		"base as asked": {Request{Recipe: onDebian, From: "gone"}, func(*house) {}, fault.NotFound},
	} {
		t.Run(name, func(t *testing.T) {
			h, b := newHouse(t)
			c.break_(h)
			_, err := b.Build(t.Context(), c.request, nil)
			if fault.KindOf(err) != c.kind || !strings.Contains(fault.HintOf(err), b.o.Paths.Builds()) {
				t.Errorf("%v, hint %q", err, fault.HintOf(err))
			}
			if left := h.left(t, b); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestNameIsTaken(t *testing.T) {
	h, b := newHouse(t)
	if _, err := b.Build(t.Context(), Request{Recipe: "small", Name: "there"}, nil); fault.KindOf(err) != fault.Conflict {
		t.Errorf("%v", err)
	}
	if left := h.left(t, b); len(left) > 0 || len(h.said) > 0 {
		t.Errorf("something was begun: %v %v", left, h.said)
	}
}

// TestReconcile: a daemon that starts takes back what a dead one was building, and nothing else.
func TestReconcile(t *testing.T) {
	h, b := newHouse(t)
	if told := b.Reconcile(t.Context()); len(told) > 0 {
		t.Errorf("nothing was under way: %v", told)
	}
	if err := os.MkdirAll(b.o.Paths.Builds(), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := b.record("build-12345678"); err != nil {
		t.Fatal(err)
	}
	h.vms["build-12345678"] = vm.Spec{}
	if told := b.Reconcile(t.Context()); len(told) > 0 || len(h.vms) != 1 {
		t.Errorf("one at work: %v", told)
	}
	b.over("build-12345678") // as in the next daemon
	h.vms["build-12345678"], h.vms["mine"] = vm.Spec{}, vm.Spec{}
	h.images["build-12345678-base"] = image.Image{}
	if told := b.Reconcile(t.Context()); len(told) != 1 || !strings.Contains(told[0], "build-12345678") {
		t.Errorf("told: %v", told)
	}
	if left := h.left(t, b); len(left) != 1 || left[0] != "VM mine" {
		t.Errorf("left: %v", left)
	}
}

// TestTakenBackLater: what a build cannot take back is taken back by the next one.
func TestTakenBackLater(t *testing.T) {
	h, b := newHouse(t)
	h.deleteFail = fault.New(fault.Precondition, "no room for the database")
	onDebian := recipe(t, "from = \"debian\"\n")
	if _, err := b.Build(t.Context(), Request{Recipe: onDebian}, nil); !strings.Contains(err.Error(), "no room") {
		t.Errorf("%v", err)
	}
	if left := h.left(t, b); len(left) != 2 { // the record and the VM
		t.Errorf("left: %v", left)
	}
	h.deleteFail = nil
	if _, err := b.Build(t.Context(), Request{Recipe: recipe(t, "from = \"image:gone\"\n")}, nil); fault.KindOf(err) != fault.NotFound {
		t.Errorf("%v", err)
	}
	if left := h.left(t, b); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestKeptBase: the base image of a VM that was left to look into goes when nobody needs it any more.
func TestKeptBase(t *testing.T) {
	h, b := newHouse(t)
	if err := os.MkdirAll(b.o.Paths.Builds(), 0o700); err != nil {
		t.Fatal(err)
	}
	const id = "build-12345678"
	if _, err := b.record(id); err != nil {
		t.Fatal(err)
	}
	if err := b.markKept(id); err != nil {
		t.Fatal(err)
	}
	b.over(id)
	h.images[baseOf(id)] = image.Image{}
	for _, needed := range []map[string]vm.Spec{{id: {Image: baseOf(id)}}, {"fork": {Image: baseOf(id)}}} {
		h.vms = needed
		if told := b.Reconcile(t.Context()); len(told) > 0 || len(h.images) != 2 {
			t.Errorf("with the VMs %v: %v, %v", needed, told, h.images)
		}
	}
	h.vms = map[string]vm.Spec{}
	if told := b.Reconcile(t.Context()); len(told) > 0 {
		t.Errorf("told: %v", told)
	}
	if left := h.left(t, b); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestTrouble: a VM that cannot go on ends the build with the reason; all other states may pass.
func TestTrouble(t *testing.T) {
	h, b := newHouse(t)
	if err := os.MkdirAll(b.o.Paths.State, 0o700); err != nil {
		t.Fatal(err)
	}
	j := &job{b: b, id: "build-12345678"}
	if err := j.trouble(t.Context()); fault.KindOf(err) != fault.Precondition {
		t.Errorf("a VM that is gone: %v", err)
	}
	h.vms[j.id] = vm.Spec{}
	for state, bad := range map[vm.State]bool{vm.Running: false, vm.Paused: false, vm.Suspending: false, vm.Failed: true, vm.Stopping: true, vm.Stopped: true} {
		h.state = state
		if err := j.trouble(t.Context()); bad != (err != nil) || bad && !strings.Contains(err.Error(), string(state)) {
			t.Errorf("%s: %v", state, err)
		}
	}
	h.state = vm.Failed
	watched, stop := j.watch(t.Context())
	<-watched.Done() // the VM is stopped
	if err := stop(watched.Err()); !strings.Contains(err.Error(), "is "+string(h.state)) {
		t.Errorf("%v", err)
	}
	gaveUp, cancel := context.WithCancel(t.Context())
	_, stop = j.watch(gaveUp)
	cancel()
	if err := stop(context.Canceled); fault.KindOf(err) != fault.Interrupted {
		t.Errorf("somebody gave up: %v", err)
	}
	if err := stop(nil); err != nil {
		t.Errorf("what succeeded: %v", err)
	}
}

func TestStale(t *testing.T) {
	_, b := newHouse(t)
	dir := recipe(t, "from = \"debian\"\npackages = [\"git\"]\n")
	r, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	i := image.Image{Manifest: image.Manifest{Recipe: r.Hash, Build: &image.Built{Recipe: dir, ListHash: r.ListHash}}}
	if said, stale := b.Stale(i); said != "" || stale {
		t.Errorf("a fresh one: %q", said)
	}
	i.Manifest.Build.Incomplete = []string{"one: it failed"}
	if said, stale := b.Stale(i); !strings.Contains(said, "left out") || stale {
		t.Errorf("one without a step: %q", said)
	}
	write(t, dir, map[string]string{RecipeFile: "from = \"debian\"\npackages = [\"git\", \"jq\"]\n"})
	if said, stale := b.Stale(i); !stale || !strings.Contains(said, "list of packages has changed") || !strings.Contains(said, "banger image build "+dir) {
		t.Errorf("one of another list: %q", said)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if said, _ := b.Stale(image.Image{Manifest: image.Manifest{Build: &image.Built{Recipe: dir}}}); said != "" {
		t.Errorf("one whose recipe is gone: %q", said)
	}
}

func TestLogKeepsTheEnd(t *testing.T) {
	l, err := newLog(filepath.Join(t.TempDir(), "x.log"))
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	l.begin(func(line string) { seen = append(seen, line) })
	for _, text := range []string{"1\n2\n3\n4\n5\n6\n7\n8\n", "10 %\r50 %\r100 %\n", "no end", strings.Repeat("x", 3*maxLine)} {
		if _, err := l.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	end := l.end()
	if len(seen) != 9 || seen[8] != "100 %" || len(end) != tailLines+1 || end[tailLines-1] != "100 %" || len(end[tailLines]) > maxLine {
		t.Errorf("seen %q, end %q", seen, end)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
