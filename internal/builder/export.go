package builder

import (
	"context"
	"errors"
	"io"
	"strconv"
	"time"

	"banger/internal/fault"
	agent "banger/internal/guest"
	"banger/internal/image"
)

// exportScript writes the root file system as a tar stream. A bind mount shows it without what is mounted on it; the work
// disk is added. Sockets cannot be in a tar. What would be left out anyway does not make the way. With
// the exit code 1 tar says that files changed while it read them, as those of a service may that still runs.
const exportScript = `set -eu
view=` + workDir + `/view
mkdir -p "$view"
mount --bind / "$view"
trap 'umount "$view"' EXIT
more=
if mountpoint -q /root; then more=./root; fi
tar -cf - --format=pax --numeric-owner --xattrs '--xattrs-include=*' --one-file-system --warning=no-file-ignored \
  --anchored '--exclude=./var/log/*' '--exclude=./var/lib/apt/lists/*' '--exclude=./var/cache/apt/*' '--exclude=./tmp/*' '--exclude=./var/tmp/*' \
  -C "$view" . -C / $more || { code=$?; test $code -eq 1 || exit $code; }
`

// tarScript tells whether what exportScript needs is there.
const tarScript = `tar --version 2>/dev/null | grep GNU`

// sizeScript prints how many bytes the files take.
const sizeScript = `du -sxk / /root /var/lib/docker /var/lib/containerd 2>/dev/null | awk '{ n += $1 } END { print n * 1024 }'`

const sizeTimeout = 10 * time.Minute

// treeSize is about how many bytes exportTree will write.
func treeSize(ctx context.Context, g *guest) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, sizeTimeout)
	defer cancel()
	text, err := g.output(ctx, sizeScript)
	if err != nil {
		return 0, unreadable(ctx, g, err)
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, fault.Wrap(fault.Unexpected, err, "the VM does not tell how large its file system is")
	}
	return n, nil
}

// exportTree writes the root file system of the VM, which comes over the guest channel.
func (b *Builder) exportTree(ctx context.Context, g *guest, w io.Writer) error {
	client, err := b.o.Machines.Agent(ctx, g.name)
	if err != nil {
		return err
	}
	g.log.begin(nil)
	full := make(chan error, 1)
	err = agent.Run(ctx, client, &telling{w, full}, g.log, "sh", "-c", exportScript)
	select {
	case err := <-full:
		return err
	default:
	}
	if err == nil {
		return nil
	}
	if exit := new(agent.ExitError); !errors.As(err, &exit) {
		// The channel broke. Whoever watches the VM will soon know why.
		select {
		case <-ctx.Done():
		case <-time.After(2 * watchPause):
		}
	}
	return unreadable(ctx, g, err)
}

func unreadable(ctx context.Context, g *guest, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fault.Wrap(fault.Precondition, &stepError{name: image.StageExport, reason: err.Error(), tail: g.log.end(), cause: err},
		"the file system of the VM cannot be read")
}

// meter tells how much went through.
type meter struct {
	w    io.Writer
	n    int64
	told func(int64)
	last time.Time
}

func (m *meter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.n += int64(n)
	if time.Since(m.last) >= updatePause {
		m.last = time.Now()
		m.told(m.n)
	}
	return n, err
}
