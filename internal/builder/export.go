package builder

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/fault"
)

// exportScript writes the root file system as a tar stream. A bind mount shows it without what is mounted on it; the
// disks of ours that belong to it (the work disk, directories that must not lie on the overlay) are added. Sockets cannot be in a tar.
const exportScript = `set -eu
command -v tar >/dev/null && tar --version 2>/dev/null | grep -q GNU || { echo "the image has no GNU tar" >&2; exit 3; }
view=` + workDir + `/view
mkdir -p "$view"
mount --bind / "$view"
trap 'umount "$view"' EXIT
more=
for dir in root var/lib/docker var/lib/containerd; do
  if mountpoint -q "/$dir"; then more="$more ./$dir"; fi
done
tar -cf - --format=pax --numeric-owner --xattrs '--xattrs-include=*' --one-file-system --warning=no-file-ignored -C "$view" . -C / $more
`

// sizeScript prints how many bytes the files take.
const sizeScript = `du -sxk / /root /var/lib/docker /var/lib/containerd 2>/dev/null | awk '{ n += $1 } END { print n * 1024 }'`

const sizeTimeout = 10 * time.Minute

func treeSize(ctx context.Context, agent agentv1connect.AgentServiceClient) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, sizeTimeout)
	defer cancel()
	var out bytes.Buffer
	if err := execIn(ctx, agent, sizeScript, &out); err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(out.String()), 10, 64)
	if err != nil {
		return 0, fault.Wrap(fault.Unexpected, err, "the VM does not tell how large its file system is")
	}
	return n, nil
}

func exportTree(ctx context.Context, agent agentv1connect.AgentServiceClient, w io.Writer) error {
	return execIn(ctx, agent, exportScript, w)
}

// maxComplaint is how many bytes of a program's complaints are kept.
const maxComplaint = 4 << 10

// execIn runs a shell script through the guest channel; what it writes goes to out.
func execIn(ctx context.Context, agent agentv1connect.AgentServiceClient, script string, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx) // ends the stream, whichever way we leave
	defer cancel()
	stream, err := agent.Exec(ctx)
	if err != nil {
		return err
	}
	start := &agentv1.ExecStart{Argv: []string{"/bin/sh", "-c", script}, Env: []string{"LC_ALL=C.UTF-8"}}
	if err := stream.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: start}}); err != nil {
		_, err = stream.Receive() // it tells why
		return err
	}
	defer func() { _ = stream.CloseRequest() }()
	var complaint []byte
	for {
		m, err := stream.Receive()
		if err != nil {
			return fmt.Errorf("the guest channel broke: %w", err)
		}
		switch o := m.GetOutput().(type) {
		case *agentv1.ExecResponse_Stdout:
			if _, err := out.Write(o.Stdout); err != nil {
				return err
			}
		case *agentv1.ExecResponse_Stderr:
			complaint = append(complaint, o.Stderr...)
			complaint = complaint[max(0, len(complaint)-maxComplaint):]
		case *agentv1.ExecResponse_Exited:
			if o.Exited.GetCode() == 0 {
				return nil
			}
			return fault.New(fault.Precondition, "the file system of the VM cannot be read: exit code %d: %s",
				o.Exited.GetCode(), strings.TrimSpace(strings.ToValidUTF8(string(complaint), "?")))
		}
	}
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
