package image

import (
	"math"
	"runtime/debug"
	"sync"
)

// makingPercent is how much the heap may grow between two collections while images are made.
const makingPercent = 50

// making counts the images that are being made, and keeps what holds of the garbage collector when there are none.
var making struct {
	sync.Mutex
	images  int
	limit   int64
	percent int
}

// elbowRoom lifts the soft memory limit of the process until the returned function is called. The daemon has one that
// fits its idle life; below it, a tree of 100 000 files (some 80 MB of nodes and inodes) would keep the garbage
// collector running without end, which takes six times as long as the work itself.
func elbowRoom() (leave func()) {
	making.Lock()
	defer making.Unlock()
	if making.images++; making.images == 1 {
		making.limit, making.percent = debug.SetMemoryLimit(math.MaxInt64), debug.SetGCPercent(makingPercent)
	}
	return func() {
		making.Lock()
		defer making.Unlock()
		if making.images--; making.images == 0 {
			debug.SetMemoryLimit(making.limit)
			debug.SetGCPercent(making.percent)
			debug.FreeOSMemory() // what the making needed is not needed again
		}
	}
}
