package boot

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/gofrs/flock"
)

// Of those who would start an agent at the same time one does, and the next waits for it; not for one that is stopped.
func TestOneStartsTheAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		lock := func() (*flock.Flock, time.Duration) {
			begin := time.Now()
			f, err := lockAgent(dir)
			if err != nil {
				t.Fatal(err)
			}
			return f, time.Since(begin)
		}
		first, took := lock()
		if took != 0 {
			t.Errorf("the first one waited %s", took)
		}
		time.AfterFunc(time.Second, func() { first.Close() })
		second, took := lock()
		if took < time.Second || took >= ensureWait {
			t.Errorf("the next one waited %s", took)
		}
		third, took := lock()
		if took < ensureWait || took > ensureWait+ensurePoll {
			t.Errorf("one that is stopped was waited for for %s", took)
		}
		second.Close()
		third.Close()
	})
	if _, err := lockAgent(t.TempDir() + "/none"); err == nil {
		t.Error("nothing was locked")
	}
}
