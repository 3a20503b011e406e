package adopt

import (
	"testing"
	"testing/synctest"
	"time"
)

// The programs of a clone rest until somebody wants one, or for as long as was said.
func TestCloneRests(t *testing.T) {
	const most = 2 * time.Second
	started := 0
	for name, c := range map[string]struct {
		want func(*Guest)
		took time.Duration
	}{
		"nobody wants any":   {func(*Guest) {}, most},
		"only SSH is wanted": {func(g *Guest) { g.want(false) }, most},
		"a program is started": {func(g *Guest) {
			l := g.Starting()
			l.Lock()
			started++
			l.Unlock()
		}, time.Second},
		"it is asked to look": {(*Guest).Want, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var s still
				g := s.guest(t)
				if err := g.hold(t.Context(), forTemplate); err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				r := g.beginRest(most)
				go func() {
					time.Sleep(time.Second)
					c.want(g)
				}()
				wait(r.other, r.most)
				if took := time.Since(begin); took != c.took {
					t.Errorf("rested %v, want %v", took, c.took)
				}
				if wait(r.ssh, most); name != "nobody wants any" && time.Since(begin) != c.took {
					t.Error("the SSH server rests although it is wanted")
				}
				if started > 0 {
					t.Error("a program was started in a guest that stands still")
				}
				if err := g.release(); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if started > 0 {
					t.Error("a program was started before all that belongs to the rest was done")
				}
				close(r.done)
				g.Want() // also when nothing rests
				synctest.Wait()
			})
			if want := name == "a program is started"; (started == 1) != want {
				t.Errorf("%d programs started", started)
			}
			started = 0
		})
	}
}
