package engine

import (
	"context"
	"sync"

	"banger/internal/vm"
)

// locks gives each VM one owner at a time. Waiting for a turn ends with the context.
type locks struct {
	mu sync.Mutex
	m  map[vm.ID]*lock
}

type lock struct {
	turn   chan struct{} // holds one token while owned
	users  int           // owner and waiters; the lock is dropped with the last
	cancel context.CancelCauseFunc
}

// acquire waits for the VM's turn. The owner must release it.
func (l *locks) acquire(ctx context.Context, id vm.ID) (release func(), err error) {
	k := l.use(id)
	select {
	case k.turn <- struct{}{}:
		return func() {
			l.mu.Lock()
			k.cancel = nil
			l.mu.Unlock()
			<-k.turn
			l.drop(id, k)
		}, nil
	case <-ctx.Done():
		l.drop(id, k)
		return nil, context.Cause(ctx)
	}
}

func (l *locks) use(id vm.ID) *lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.m == nil {
		l.m = map[vm.ID]*lock{}
	}
	k, ok := l.m[id]
	if !ok {
		k = &lock{turn: make(chan struct{}, 1)}
		l.m[id] = k
	}
	k.users++
	return k
}

func (l *locks) drop(id vm.ID, k *lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.users--; k.users == 0 {
		delete(l.m, id)
	}
}

// interruptible lets others cancel what the owner does; nil ends that.
func (l *locks) interruptible(id vm.ID, cancel context.CancelCauseFunc) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k, ok := l.m[id]; ok {
		k.cancel = cancel
	}
}

// interrupt cancels what the owner does, if it lets others do so.
func (l *locks) interrupt(id vm.ID, cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k, ok := l.m[id]; ok && k.cancel != nil {
		k.cancel(cause)
	}
}
