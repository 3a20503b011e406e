package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger/internal/artifact"
	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

func houseTemplates(dir string) TemplateConfig {
	return TemplateConfig{
		Store: template.Open(paths.Under(dir).Templates()), DiskBytes: houseSeed, WorkDiskBytes: houseSeed, Settle: time.Millisecond,
	}
}

// newTemplateHouse is a house in which creates are restored.
func newTemplateHouse(t *testing.T) *house {
	t.Helper()
	h := newHouse(t)
	h.close()
	h.templates = houseTemplates(filepath.Dir(h.p.State))
	h.open()
	return h
}

func (h *house) warm() template.Template {
	h.t.Helper()
	made, err := h.WarmTemplate(h.t.Context(), houseSpec("any"), nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return made
}

// createTold creates a VM and returns it with the stages that were done and the notices.
func (h *house) createTold(spec vm.Spec) (v vm.VM, stages, notices []string) {
	h.t.Helper()
	v, err := h.Create(h.t.Context(), spec, true, func(e progress.Event) {
		switch e.Status {
		case progress.Done:
			stages = append(stages, e.Stage)
		case progress.Notice:
			notices = append(notices, e.Message)
		}
	})
	if err != nil {
		h.t.Fatalf("create %s: %v", spec.Name, err)
	}
	return v, stages, notices
}

func (h *house) awaitTemplates(n int) []template.Template {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		all, err := h.Templates(h.t.Context())
		if err != nil {
			h.t.Fatal(err)
		}
		if len(all) == n {
			return all
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%d templates, want %d", len(all), n)
		}
	}
}

var restoredStages = []string{
	"check", "record", "root-disk", "work-disk", "modules", "network", "ssh-keys", "agent-config", "load", "identity", "ready",
}

// The first create of a shape boots, and has a template made; the next one is restored from it.
func TestSecondCreateIsRestored(t *testing.T) {
	h := newTemplateHouse(t)
	first, stages, _ := h.createTold(houseSpec("first"))
	if slices.Contains(stages, stageLoad) || TemplateOf(first) != "" {
		t.Errorf("the first went through %v", stages)
	}
	made := h.awaitTemplates(1)[0]
	second, stages, notices := h.createTold(houseSpec("second"))
	if !slices.Equal(stages, restoredStages) || len(notices) > 0 || TemplateOf(second) != made.Key {
		t.Errorf("the second went through %v, told %v, of template %q", stages, notices, TemplateOf(second))
	}
	if all := h.awaitTemplates(1); all[0].Uses != 1 {
		t.Errorf("used %d times", all[0].Uses)
	}
	entries, err := os.ReadDir(filepath.Dir(made.Dir))
	if err != nil || len(entries) != 2 { // the lock and the template
		t.Errorf("%v, %v", entries, err)
	}
	// A stop and a start boot it: it is of no template then.
	for _, verb := range []func() (vm.VM, error){
		func() (vm.VM, error) { return h.Stop(t.Context(), "second", false, nil) },
		func() (vm.VM, error) { return h.Start(t.Context(), "second", nil) },
	} {
		v, err := verb()
		if err != nil {
			t.Fatal(err)
		}
		if v.State == vm.Running && TemplateOf(v) != "" {
			t.Errorf("booted, and still of template %s", TemplateOf(v))
		}
	}
	spec := houseSpec("cold")
	spec.Cold = true
	if _, stages, _ := h.createTold(spec); slices.Contains(stages, stageLoad) {
		t.Errorf("cold, and restored: %v", stages)
	}
	spec = houseSpec("large")
	spec.DiskBytes, spec.WorkDiskBytes = 2*houseSeed, 3*houseSeed
	large, stages, _ := h.createTold(spec)
	if !slices.Equal(stages, restoredStages) {
		t.Errorf("with larger disks: %v", stages)
	}
	for name, want := range map[string]int64{paths.OverlayDisk: 2 * houseSeed, paths.WorkDisk: 3 * houseSeed} {
		if info, err := os.Stat(filepath.Join(h.p.VM(large.ID), name)); err != nil || info.Size() != want {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if _, err := h.Suspend(t.Context(), "large", nil); err != nil {
		t.Error(err)
	}
	if v, err := h.Resume(t.Context(), "large", nil); err != nil || TemplateOf(v) != "" {
		t.Errorf("resumed from its own memory, of template %q: %v", TemplateOf(v), err)
	}
}

// Whatever changes the shape makes another template.
func TestAnotherShapeIsAnotherTemplate(t *testing.T) {
	h := newTemplateHouse(t)
	h.warm()
	driver := h.c.Drivers[0]
	caps, err := driver.Caps(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*vm.Spec){
		"memory": func(s *vm.Spec) { s.MemoryBytes *= 2 }, "CPUs": func(s *vm.Spec) { s.CPUs++ }, "units": func(s *vm.Spec) { s.Units = vm.UnitsStock },
	} {
		spec := houseSpec("any")
		change(&spec)
		if w, err := h.wish(t.Context(), spec, driver, caps); err != nil {
			t.Fatal(err)
		} else if _, err := h.c.Templates.Store.Get(w.key); fault.KindOf(err) != fault.NotFound {
			t.Errorf("another number of %s: %v", what, err)
		}
	}
	limited := houseSpec("limited")
	limited.DiskRate, limited.NetRate = 1<<20, 1<<20
	if w, err := h.wish(t.Context(), limited, driver, caps); err != nil || w.spec.DiskRate != 0 || w.spec.NetRate != 0 {
		t.Errorf("the template of a VM with limits has them, too: %+v, %v", w, err)
	} else if _, err := h.c.Templates.Store.Get(w.key); err != nil {
		t.Errorf("limits make another template: %v", err)
	}
	h.close()
	h.files.img.Digest = "sha256:2" // another image of that name
	h.images = h.files
	h.open()
	if _, stages, _ := h.createTold(houseSpec("web")); slices.Contains(stages, stageLoad) {
		t.Errorf("restored from a template of another image: %v", stages)
	}
	h.awaitTemplates(2)
}

// What no VM can have no template has, and a disk that is smaller than a template's is not made of that one.
func TestShapesThatDoNotFit(t *testing.T) {
	h := newTemplateHouse(t)
	for what, change := range map[string]func(*vm.Spec){
		"no CPU": func(s *vm.Spec) { s.CPUs = 0 }, "too many CPUs": func(s *vm.Spec) { s.CPUs = 1 << 20 },
		"no memory": func(s *vm.Spec) { s.MemoryBytes = 1 }, "too much memory": func(s *vm.Spec) { s.MemoryBytes = 1 << 60 },
		"a work disk without room for its seed": func(s *vm.Spec) { s.WorkDiskBytes = houseSeed / 2 },
		"a disk of nothing":                     func(s *vm.Spec) { s.DiskBytes = 0 },
		"a balloon":                             func(s *vm.Spec) { s.Balloon = true },
		"another VMM":                           func(s *vm.Spec) { s.VMM = "none" },
	} {
		spec := houseSpec("any")
		change(&spec)
		if _, err := h.WarmTemplate(t.Context(), spec, nil); fault.KindOf(err) != fault.Usage {
			t.Errorf("%s: %v", what, err)
		}
		h.nothingButTemplates(t, 0)
	}
	h.close()
	h.templates.DiskBytes = 2 * houseSeed
	h.open()
	spec := houseSpec("any")
	spec.DiskBytes = 2 * houseSeed
	if _, err := h.WarmTemplate(t.Context(), spec, nil); err != nil {
		t.Fatal(err)
	}
	if v, stages, notices := h.createTold(houseSpec("small")); slices.Contains(stages, stageLoad) || TemplateOf(v) != "" || len(notices) > 0 {
		t.Errorf("made of a template with a larger disk: %v, told %q", stages, notices)
	}
}

// The file of an image is changed underneath its templates: they are not used, and what was suspended does not go
// on; both is told.
func TestImageThatChangesUnderneath(t *testing.T) {
	h := newTemplateHouse(t)
	h.close()
	shelf := artifact.Open(h.p.Images(), "image", "image.json")
	name, err := shelf.Build(func(dir string) (string, any, error) {
		seed, err := os.ReadFile(h.files.img.WorkSeed)
		if err == nil {
			err = errors.Join(os.WriteFile(filepath.Join(dir, "root.ext4"), []byte("root"), 0o600), os.WriteFile(filepath.Join(dir, "work-seed.ext4"), seed, 0o600))
		}
		if err != nil {
			return "", nil, err
		}
		files, err := artifact.Describe(dir, "root.ext4", "work-seed.ext4")
		return "real", image.Manifest{Name: "real", Digest: artifact.Digest(files), Files: files, CreatedAt: time.Now()}, err
	})
	if err = errors.Join(err, shelf.SetDefault(name)); err != nil {
		t.Fatal(err)
	}
	images := image.Open(h.p.Images())
	h.images = images
	h.open()
	h.warm()
	if _, stages, _ := h.createTold(houseSpec("web")); !slices.Equal(stages, restoredStages) {
		t.Fatalf("it went through %v", stages)
	}
	if _, err := h.Suspend(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	img, err := images.Get(t.Context(), "")
	if err == nil {
		err = os.WriteFile(img.Root, []byte("toor"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.Create(t.Context(), houseSpec("next"), true, nil)
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "image real is damaged") || fault.HintOf(err) == "" {
		t.Errorf("create of a changed image: %v, hint %q", err, fault.HintOf(err))
	}
	if _, err := h.Resume(t.Context(), "web", nil); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "image real is damaged") {
		t.Errorf("resume on a changed image: %v", err)
	}
	if v, err := h.Get(t.Context(), "web"); err != nil || v.State != vm.Suspended {
		t.Errorf("%+v, %v", v, err)
	}
	if err := os.WriteFile(img.Root, []byte("root"), 0o600); err != nil { // as it was, at another time
		t.Fatal(err)
	}
	if _, err := h.Resume(t.Context(), "web", nil); err != nil {
		t.Errorf("with the image as it was: %v", err)
	}
	if _, stages, _ := h.createTold(houseSpec("next")); !slices.Equal(stages, restoredStages) {
		t.Errorf("with the image as it was: %v", stages)
	}
}

// Two creates that race for the first template have one made.
func TestRaceForTheFirstTemplate(t *testing.T) {
	h := newTemplateHouse(t)
	var mu sync.Mutex
	makers := 0
	h.after(func(operation, stage string) {
		if operation == "template" && stage == stageMachine {
			mu.Lock()
			makers++
			mu.Unlock()
		}
	})
	var both sync.WaitGroup
	for i := range 2 {
		both.Go(func() {
			if _, err := h.Create(context.Background(), houseSpec(fmt.Sprint("web", i)), true, nil); err != nil {
				t.Error(err)
			}
		})
	}
	for range 2 {
		both.Go(func() {
			if _, err := h.WarmTemplate(context.Background(), houseSpec("any"), nil); err != nil {
				t.Error(err)
			}
		})
	}
	both.Wait()
	h.awaitTemplates(1)
	h.maker.turn <- struct{}{} // whoever is at it has ended
	<-h.maker.turn
	mu.Lock()
	defer mu.Unlock()
	if makers != 1 {
		t.Errorf("%d machines were made templates of", makers)
	}
}

// A template that cannot be used is told of once, and the VM boots.
func TestBadTemplates(t *testing.T) {
	for what, harm := range map[string]func(dir string) error{
		"memory cut":            func(d string) error { return os.Truncate(filepath.Join(d, vmm.SavedMemory), 1) },
		"no state":              func(d string) error { return os.Remove(filepath.Join(d, vmm.SavedState)) },
		"no manifest":           func(d string) error { return os.Remove(filepath.Join(d, template.ManifestFile)) },
		"other driver":          func(d string) error { return rewrite(filepath.Join(d, vmm.SavedManifest), "fake", "mock") },
		"disk gone":             func(d string) error { return os.Remove(filepath.Join(d, paths.WorkDisk)) },
		"state bytes":           func(d string) error { return rewrite(filepath.Join(d, vmm.SavedState), "", "") },
		"a bit of the manifest": func(d string) error { return rewrite(filepath.Join(d, vmm.SavedManifest), `"`, "'") },
		"a bit of the memory":   func(d string) error { return rewrite(filepath.Join(d, vmm.SavedMemory), "", "") },
		"a bit of the overlay":  func(d string) error { return rewrite(filepath.Join(d, paths.OverlayDisk), "", "") },
		"a bit of the work disk, after a use": func(d string) error {
			return rewrite(filepath.Join(d, paths.WorkDisk), "", "")
		},
	} {
		t.Run(what, func(t *testing.T) {
			h := newTemplateHouse(t)
			made := h.warm()
			if strings.Contains(what, "after a use") {
				h.create("first")
			}
			if err := harm(made.Dir); err != nil {
				t.Fatal(err)
			}
			v, stages, notices := h.createTold(houseSpec("web"))
			if !slices.Contains(stages, stageBoot) || TemplateOf(v) != "" {
				t.Errorf("it went through %v, of template %q", stages, TemplateOf(v))
			}
			if len(notices) != 1 || !strings.Contains(notices[0], made.Key) {
				t.Errorf("told %q", notices)
			}
			h.awaitTemplates(1) // made anew
			if _, stages, notices := h.createTold(houseSpec("next")); !slices.Equal(stages, restoredStages) || len(notices) > 0 {
				t.Errorf("the next one: %v, told %q", stages, notices)
			}
		})
	}
}

// rewrite changes bytes of a file and keeps its time; without bytes to look for it changes the first one.
func rewrite(path, from, to string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	changed := strings.Replace(string(text), from, to, 1)
	if from == "" && len(text) > 0 {
		changed = string(text[0]^1) + string(text[1:])
	}
	if changed == string(text) {
		return fmt.Errorf("%s holds no %q", path, from)
	}
	return errors.Join(os.WriteFile(path, []byte(changed), 0o600), os.Chtimes(path, info.ModTime(), info.ModTime()))
}

// A template that fails again and again is not made for ever.
func TestABlamedTemplateIsNotMadeAgain(t *testing.T) {
	h := newTemplateHouse(t)
	made := h.warm()
	for range maxFailures {
		h.maker.blame(made.Key)
	}
	if err := h.DeleteTemplate(t.Context(), made.Key); err != nil {
		t.Fatal(err)
	}
	h.create("web")
	if h.maker.add(&wish{key: made.Key}) {
		t.Error("queued once more")
	}
}

// Deleting a template harms nobody who lives of it; eviction spares it as long as somebody does.
func TestTemplateInUse(t *testing.T) {
	h := newTemplateHouse(t)
	made := h.warm()
	h.create("web")
	old := func() time.Time { return time.Now().Add(DefaultTemplateAge + time.Hour) }
	h.c.Now = old
	if gone, err := h.evictTemplates(t.Context()); err != nil || len(gone) > 0 {
		t.Errorf("evicted %v, %v", gone, err)
	}
	if err := h.DeleteTemplate(t.Context(), made.Key[:3]); err != nil {
		t.Fatal(err)
	}
	if err := h.DeleteTemplate(t.Context(), made.Key); fault.KindOf(err) != fault.NotFound {
		t.Errorf("deleted twice: %v", err)
	}
	agent, err := h.Agent(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := agent.Status(t.Context(), nil); err != nil {
		t.Error(err)
	}
	h.c.Now = time.Now
	h.warm()
	if err := h.Delete(t.Context(), "web", true, nil); err != nil {
		t.Fatal(err)
	}
	h.c.Now = old
	if gone, err := h.evictTemplates(t.Context()); err != nil || !slices.Equal(gone, []string{made.Key}) {
		t.Errorf("evicted %v, %v", gone, err)
	}
}

// A template that vanishes between its look-up and the clone of its disks is no failure.
func TestTemplateVanishes(t *testing.T) {
	h := newTemplateHouse(t)
	made := h.warm()
	var once sync.Once
	h.after(func(operation, stage string) {
		if operation == "create" && stage == "root-disk" {
			once.Do(func() {
				if err := h.c.Templates.Store.Delete(made.Key); err != nil {
					t.Error(err)
				}
			})
		}
	})
	v, stages, _ := h.createTold(houseSpec("web"))
	if !slices.Contains(stages, stageBoot) || TemplateOf(v) != "" {
		t.Errorf("it went through %v", stages)
	}
	h.awaitTemplates(1)
}

// A create that is given up while it is restored leaves the template, and nothing else.
func TestCancelledRestore(t *testing.T) {
	for _, at := range restoredStages[2 : len(restoredStages)-1] {
		t.Run(at, func(t *testing.T) {
			h := newTemplateHouse(t)
			h.warm()
			ctx, cancel := context.WithCancel(t.Context())
			h.after(func(operation, stage string) {
				if operation == "create" && stage == at {
					cancel()
				}
			})
			if _, err := h.Create(ctx, houseSpec("web"), true, nil); fault.KindOf(err) != fault.Interrupted {
				t.Errorf("create: %v", err)
			}
			h.nothingButTemplates(t, 1)
		})
	}
}

// nothingButTemplates checks that no VM is left and n whole templates, and no half ones.
func (h *house) nothingButTemplates(t *testing.T, n int) {
	t.Helper()
	if all, err := h.List(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("VMs left: %+v, %v", all, err)
	}
	if s := h.net.String(); strings.Contains(s, "tap") || strings.Contains(s, "nat") {
		t.Errorf("left %s", s)
	}
	if left, _ := filepath.Glob(filepath.Join(h.p.VMs(), "*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
	if left, _ := filepath.Glob(filepath.Join(h.p.Templates(), ".new-*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
	all, err := h.Templates(t.Context())
	if err != nil || len(all) != n || n > 0 && all[0].Problem != "" {
		t.Errorf("templates %+v, %v", all, err)
	}
	h.noProcesses(t)
}

// noProcesses checks that no machine works below the house.
func (h *house) noProcesses(t *testing.T) {
	t.Helper()
	if left := machines(filepath.Dir(h.p.State)); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
}

// makerStages are the stages of a template that is made.
var makerStages = []string{
	"check", "root-disk", "work-disk", "modules", "network", "ssh-keys", "agent-config", "machine", "boot", "agent", "quiesce", "pause", "save",
	"release", "keep",
}

// What makes a template fail at any stage leaves nothing, and a create still boots.
func TestCancelledMaking(t *testing.T) {
	spoken := false
	for _, at := range makerStages[:len(makerStages)-1] {
		spoken = spoken || at == stageAgent // so far it had no time to say much
		t.Run(at, func(t *testing.T) {
			h := newTemplateHouse(t)
			ctx, cancel := context.WithCancel(t.Context())
			h.after(func(operation, stage string) {
				if operation == "template" && stage == at {
					cancel()
				}
			})
			if _, err := h.WarmTemplate(ctx, houseSpec("any"), nil); err == nil {
				t.Error("made, though cancelled")
			}
			h.nothingButTemplates(t, 0)
			if console, err := os.ReadFile(h.templates.Store.FailedLog()); spoken && len(console) == 0 {
				t.Errorf("the console is lost: %v", err)
			}
			h.after(nil)
			h.warm()
		})
	}
}

// Variables of a child that does one thing in a house and kills itself after a stage.
const (
	dieIn    = "BANGER_TEST_DIE_IN"    // directory of the house
	dieDoing = "BANGER_TEST_DIE_DOING" // template or create
	dieAfter = "BANGER_TEST_DIE_AFTER" // stage
)

// TestDieInChild is the child's part of TestKilledDaemon.
func TestDieInChild(t *testing.T) {
	dir := os.Getenv(dieIn)
	if dir == "" {
		return
	}
	h := houseIn(t, dir, houseTemplates(dir))
	h.after(func(operation, stage string) {
		if operation == os.Getenv(dieDoing) && stage == os.Getenv(dieAfter) {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // until it has come
		}
	})
	if os.Getenv(dieDoing) == "create" {
		h.create("web")
	} else {
		h.warm()
	}
}

// A daemon that is killed at any stage of making a template, or of a create from one, leaves what the next one
// takes back.
func TestKilledDaemon(t *testing.T) {
	for doing, stages := range map[string][]string{"template": makerStages, "create": append([]string{"machine"}, restoredStages...)} {
		for _, stage := range stages {
			t.Run(doing+" "+stage, func(t *testing.T) {
				t.Parallel()
				killedDaemon(t, doing, stage)
			})
		}
	}
}

func killedDaemon(t *testing.T, doing, stage string) {
	h := newTemplateHouse(t)
	if doing == "create" {
		h.warm()
	}
	h.close()
	child := exec.Command("/proc/self/exe", "-test.run=^TestDieInChild$")
	child.Env = append(os.Environ(), dieIn+"="+filepath.Dir(h.p.State), dieDoing+"="+doing, dieAfter+"="+stage)
	out, err := child.CombinedOutput()
	if child.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("the child was not killed: %v\n%s", err, out)
	}
	h.open()
	told, err := h.Reconcile(t.Context())
	if err != nil {
		t.Errorf("reconcile: %q, %v", told, err)
	}
	if doing == "create" && (stage == stageReady) { // it was done
		if v, err := h.Get(t.Context(), "web"); err != nil || v.State != vm.Running {
			t.Errorf("%+v, %v", v, err)
		}
		if err := h.Delete(t.Context(), "web", true, nil); err != nil {
			t.Fatal(err)
		}
	}
	templates := 0
	if doing == "create" || stage == stageKeep {
		templates = 1
	}
	h.nothingButTemplates(t, templates)
	if _, err := h.WarmTemplate(t.Context(), houseSpec("any"), nil); err != nil {
		t.Error(err)
	}
	if _, stages, _ := h.createTold(houseSpec("after")); !slices.Contains(stages, stageLoad) {
		t.Errorf("the next create went through %v", stages)
	}
}
