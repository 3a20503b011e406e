package image

import (
	"math"
	"runtime/debug"
	"sync"
)

// making counts the images that are being made, and keeps the memory limit that holds when there are none.
var making struct {
	sync.Mutex
	images int
	limit  int64
}

// elbowRoom lifts the soft memory limit of the process until the returned function is called. The daemon has one that
// fits its idle life; below it, a tree of 100 000 files (some 80 MB of nodes and inodes) would keep the garbage
// collector running without end, which takes six times as long as the work itself.
func elbowRoom() (leave func()) {
	making.Lock()
	defer making.Unlock()
	if making.images++; making.images == 1 {
		making.limit = debug.SetMemoryLimit(math.MaxInt64)
	}
	return func() {
		making.Lock()
		defer making.Unlock()
		if making.images--; making.images == 0 {
			debug.SetMemoryLimit(making.limit)
			debug.FreeOSMemory() // what the making needed is not needed again
		}
	}
}
