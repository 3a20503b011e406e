package cli

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "banger/api/agent/v1"
	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/build"
	"banger/internal/client"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/wire/wirefault"
)

// world is a daemon in memory behind a real socket: VMs are rows that change state at once.
type world struct {
	bangerv1connect.UnimplementedVMServiceHandler
	bangerv1connect.UnimplementedImageServiceHandler
	bangerv1connect.UnimplementedDaemonServiceHandler
	bangerv1connect.UnimplementedSnapshotServiceHandler

	mu       sync.Mutex
	vms      map[string]*bangerv1.VM
	calls    []string // procedures, in the order of their arrival
	endpoint *bangerv1.SSHEndpoint
	hang     string                    // a VM of this name never gets anywhere
	deaf     bool                      // programs ignore signals
	execed   []*bangerv1.ExecVMRequest // of the last ExecVM
	restored []*bangerv1.RestoreSnapshotRequest
}

var (
	born = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	now  = born.Add(26 * time.Hour)
)

func (w *world) call(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls = append(w.calls, name)
}

func (w *world) look(name string) (*bangerv1.VM, error) {
	if v, ok := w.vms[name]; ok {
		return v, nil
	}
	return nil, wirefault.ToConnect(fault.New(fault.NotFound, "there is no VM %s", name).WithHint("see: banger vm list"))
}

func (w *world) add(name, state string) *bangerv1.VM {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := &bangerv1.VM{
		Id: fmt.Sprintf("%08x", len(w.vms)+1), Name: name, State: state, Image: "debian", Kernel: "6.12-cloud", Vmm: "qemu",
		Cpus: 2, MemoryBytes: 1 << 30, DiskBytes: 8 << 30, WorkDiskBytes: 4 << 30, Ip: "172.30.0.2", Mac: "02:00:00:00:00:01",
		DnsName: name + ".vm", Nat: true, CreatedAt: timestamppb.New(born), Units: "fast", Accelerator: "tcg",
		SlowReason: "no /dev/kvm", Directory: "/state/vms/" + name,
	}
	if state == "running" {
		v.StartedAt, v.Pid = timestamppb.New(born.Add(time.Hour)), 4711
	}
	w.vms[name] = v
	return v
}

func progressOf(stage string) []*bangerv1.Progress {
	return []*bangerv1.Progress{
		{Stage: stage, Status: bangerv1.Progress_STATUS_STARTED},
		{Stage: stage, Status: bangerv1.Progress_STATUS_DONE, DurationNanos: 120e6},
	}
}

func (w *world) CreateVM(ctx context.Context, r *bangerv1.CreateVMRequest, s *connect.ServerStream[bangerv1.CreateVMResponse]) error {
	w.call("CreateVM")
	for _, p := range progressOf("overlay disk") {
		if err := s.Send(&bangerv1.CreateVMResponse{Event: &bangerv1.CreateVMResponse_Progress{Progress: p}}); err != nil {
			return err
		}
	}
	name := r.GetSpec().GetName()
	if name == w.hang {
		<-ctx.Done()
		return wirefault.ToConnect(ctx.Err())
	}
	w.mu.Lock()
	_, taken := w.vms[name]
	w.mu.Unlock()
	if taken {
		return wirefault.ToConnect(fault.New(fault.Conflict, "the name %s is taken", name))
	}
	state := "running"
	if r.GetNoStart() {
		state = "stopped"
	}
	return s.Send(&bangerv1.CreateVMResponse{Event: &bangerv1.CreateVMResponse_Vm{Vm: w.add(name, state)}})
}

func (w *world) ListVMs(context.Context, *bangerv1.ListVMsRequest) (*bangerv1.ListVMsResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	res := &bangerv1.ListVMsResponse{}
	for _, name := range []string{"api", "web", strings.Repeat("long-", 12) + "name"} {
		if v, ok := w.vms[name]; ok {
			res.Vms = append(res.Vms, v)
		}
	}
	return res, nil
}

func (w *world) GetVM(_ context.Context, r *bangerv1.GetVMRequest) (*bangerv1.GetVMResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, err := w.look(r.GetVm())
	return &bangerv1.GetVMResponse{Vm: v}, err
}

func (w *world) become(name, state string) (*bangerv1.VM, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, err := w.look(name)
	if err == nil {
		v.State = state
	}
	return v, err
}

func (w *world) StartVM(_ context.Context, r *bangerv1.StartVMRequest, s *connect.ServerStream[bangerv1.StartVMResponse]) error {
	v, err := w.become(r.GetVm(), "running")
	if err != nil {
		return err
	}
	return s.Send(&bangerv1.StartVMResponse{Event: &bangerv1.StartVMResponse_Vm{Vm: v}})
}

func (w *world) RestoreSnapshot(_ context.Context, r *bangerv1.RestoreSnapshotRequest, s *connect.ServerStream[bangerv1.RestoreSnapshotResponse]) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.restored = append(w.restored, r)
	v, err := w.look(r.GetVm())
	if err != nil {
		return err
	}
	return s.Send(&bangerv1.RestoreSnapshotResponse{Event: &bangerv1.RestoreSnapshotResponse_Vm{Vm: v}})
}

func (w *world) StopVM(_ context.Context, r *bangerv1.StopVMRequest, s *connect.ServerStream[bangerv1.StopVMResponse]) error {
	w.call(fmt.Sprintf("StopVM force=%t", r.GetForce()))
	v, err := w.become(r.GetVm(), "stopped")
	if err != nil {
		return err
	}
	return s.Send(&bangerv1.StopVMResponse{Event: &bangerv1.StopVMResponse_Vm{Vm: v}})
}

func (w *world) DeleteVM(_ context.Context, r *bangerv1.DeleteVMRequest, _ *connect.ServerStream[bangerv1.DeleteVMResponse]) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, err := w.look(r.GetVm())
	switch {
	case err != nil:
		return err
	case v.GetState() == "running" && !r.GetForce():
		return wirefault.ToConnect(fault.New(fault.Conflict, "VM %s is running", v.GetName()).WithHint("stop it first, or delete it with --force"))
	}
	delete(w.vms, r.GetVm())
	return nil
}

func (w *world) PingVM(_ context.Context, r *bangerv1.PingVMRequest) (*bangerv1.PingVMResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, err := w.look(r.GetVm())
	if err == nil && v.GetState() != "running" {
		err = wirefault.ToConnect(fault.New(fault.Conflict, "VM %s is %s", v.GetName(), v.GetState()))
	}
	return &bangerv1.PingVMResponse{RoundTripNanos: 1.5e6, AgentBuild: "b", BootId: "boot", UptimeSeconds: 90}, err
}

// ExecVM echoes stdin to stdout, the arguments to stderr, and exits with 7. A signal ends it with
// 128 more than its number.
func (w *world) ExecVM(_ context.Context, s *connect.BidiStream[bangerv1.ExecVMRequest, bangerv1.ExecVMResponse]) error {
	w.call("ExecVM")
	send := func(r *agentv1.ExecResponse) error { return s.Send(&bangerv1.ExecVMResponse{Exec: r}) }
	code := int32(7)
	for {
		m, err := s.Receive()
		if err != nil {
			return err
		}
		w.mu.Lock()
		w.execed = append(w.execed, m)
		w.mu.Unlock()
		switch in := m.GetExec().GetInput().(type) {
		case *agentv1.ExecRequest_Start:
			if err := send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Stderr{Stderr: []byte(strings.Join(in.Start.GetArgv(), "|"))}}); err != nil {
				return err
			}
			if in.Start.GetStdin() || in.Start.GetArgv()[0] == "sleep" {
				continue
			}
		case *agentv1.ExecRequest_Stdin:
			if err := send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Stdout{Stdout: in.Stdin}}); err != nil {
				return err
			}
			if !bytes.Contains(in.Stdin, []byte{4}) { // as a terminal does with Ctrl-D
				continue
			}
		case *agentv1.ExecRequest_Signal:
			if w.deaf {
				continue
			}
			code = 128 + in.Signal
		case nil:
			continue
		}
		return send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Exited{Exited: &agentv1.ExecExited{Code: code}}})
	}
}

func (w *world) GetSSHEndpoint(_ context.Context, r *bangerv1.GetSSHEndpointRequest) (*bangerv1.GetSSHEndpointResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.look(r.GetVm())
	if w.endpoint != nil {
		return &bangerv1.GetSSHEndpointResponse{Endpoint: w.endpoint}, err
	}
	return &bangerv1.GetSSHEndpointResponse{Endpoint: &bangerv1.SSHEndpoint{
		User: "root", Host: "172.30.0.2", Port: 22, IdentityFile: "/k/id", KnownHostsFile: "/a b/known_hosts", HostKeyAlias: "web.vm",
	}}, err
}

func (w *world) ReadLog(_ context.Context, r *bangerv1.ReadLogRequest, s *connect.ServerStream[bangerv1.ReadLogResponse]) error {
	text := fmt.Sprintf("%s %s %d\n", r.GetVm(), r.GetSource(), r.GetTailLines())
	return s.Send(&bangerv1.ReadLogResponse{Data: []byte(text)})
}

func (w *world) image() *bangerv1.Image {
	return &bangerv1.Image{
		Name: "debian", Digest: "sha256:ab", Description: "Debian stable", Architecture: "amd64", SizeBytes: 262 << 20,
		WorkSeedBytes: 64 << 20, PackageCount: 123, CreatedAt: timestamppb.New(born), IsDefault: true, DefaultFrom: "image default", UsedBy: []string{"web"},
		Directory: "/state/images/debian",
	}
}

func (w *world) kernel() *bangerv1.Kernel {
	return &bangerv1.Kernel{
		Name: "6.12-cloud", Release: "6.12.0-cloud-amd64", Architecture: "amd64", SizeBytes: 40 << 20, IsDefault: true, DefaultFrom: "kernel default",
		Problem: "modules.ext4 is missing", Directory: "/state/kernels/6.12-cloud",
	}
}

func (w *world) ListImages(context.Context, *bangerv1.ListImagesRequest) (*bangerv1.ListImagesResponse, error) {
	return &bangerv1.ListImagesResponse{Images: []*bangerv1.Image{w.image()}}, nil
}

func (w *world) GetImage(_ context.Context, r *bangerv1.GetImageRequest) (*bangerv1.GetImageResponse, error) {
	if r.GetName() != "debian" {
		return nil, wirefault.ToConnect(fault.New(fault.NotFound, "there is no image %s", r.GetName()))
	}
	return &bangerv1.GetImageResponse{Image: w.image()}, nil
}

func (w *world) ListKernels(context.Context, *bangerv1.ListKernelsRequest) (*bangerv1.ListKernelsResponse, error) {
	return &bangerv1.ListKernelsResponse{Kernels: []*bangerv1.Kernel{w.kernel()}}, nil
}

func (w *world) Setup(_ context.Context, _ *bangerv1.SetupRequest, s *connect.ServerStream[bangerv1.SetupResponse]) error {
	for _, p := range progressOf("bootstrap") {
		if err := s.Send(&bangerv1.SetupResponse{Event: &bangerv1.SetupResponse_Progress{Progress: p}}); err != nil {
			return err
		}
	}
	result := &bangerv1.SetupResult{Image: w.image(), Kernel: w.kernel(), AlreadyDone: true}
	return s.Send(&bangerv1.SetupResponse{Event: &bangerv1.SetupResponse_Result{Result: result}})
}

func (w *world) GetStatus(context.Context, *bangerv1.GetStatusRequest) (*bangerv1.GetStatusResponse, error) {
	return &bangerv1.GetStatusResponse{
		ApiVersion: build.API, Build: "b", Pid: 42, StartedAt: timestamppb.New(born), StateDirectory: "/state", VmCount: 3, RunningCount: 1,
		Drivers: []*bangerv1.Driver{
			{Name: "qemu", Available: true, Version: "7.2", Accelerator: "tcg", Reason: "no /dev/kvm"},
			{Name: "firecracker", Reason: "not installed"},
		},
		DefaultVmm: "qemu", DefaultVmmReason: "no /dev/kvm", Reconciled: []string{"removed TAP bgr-1"},
		Subnet: "172.30.0.0/16", Bridge: "banger0",
	}, nil
}

// serve puts the world behind a socket.
func serve(t *testing.T, w *world) paths.Paths {
	t.Helper()
	dir, err := os.MkdirTemp("", "cli") // short: a socket's path ends at 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	p := paths.Under(dir)
	if err := p.Make(); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", p.Socket())
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(bangerv1connect.NewVMServiceHandler(w))
	mux.Handle(bangerv1connect.NewImageServiceHandler(w))
	mux.Handle(bangerv1connect.NewDaemonServiceHandler(w))
	mux.Handle(bangerv1connect.NewSnapshotServiceHandler(w))
	mux.HandleFunc(client.HelloPath, func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set(client.HeaderBuild, build.ID())
		rw.Header().Set(client.HeaderAPI, strconv.Itoa(build.API))
	})
	s := &http.Server{Handler: mux, Protocols: new(http.Protocols)}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return p
}

// session is one user at a fake daemon.
type session struct {
	t     *testing.T
	world *world
	paths paths.Paths
	stdin string
}

func newSession(t *testing.T, vms ...string) *session {
	w := &world{vms: map[string]*bangerv1.VM{}}
	for _, v := range vms {
		name, state, _ := strings.Cut(v, "=")
		w.add(name, state)
	}
	return &session{t: t, world: w, paths: serve(t, w)}
}

func (s *session) env(args ...string) (*Env, *bytes.Buffer, *bytes.Buffer) {
	var out, errs bytes.Buffer
	e := &Env{
		Args: args, Stdin: strings.NewReader(s.stdin), Stdout: &out, Stderr: &errs,
		Getenv: func(string) string { return "" }, Paths: s.paths, Now: func() time.Time { return now },
	}
	e.Dial = func(ctx context.Context, _ bool) (*client.Client, error) {
		return client.Dial(ctx, client.Options{Paths: s.paths})
	}
	return e, &out, &errs
}

// run runs one command line: words are parted at spaces.
func (s *session) run(line string) (stdout, stderr string, code int) {
	return s.runContext(context.Background(), line)
}

// runWords runs one command line given word by word.
func (s *session) runWords(words ...string) (stdout, stderr string, code int) {
	e, out, errs := s.env(words...)
	code = Run(context.Background(), e)
	return out.String(), errs.String(), code
}

func (s *session) runContext(ctx context.Context, line string) (stdout, stderr string, code int) {
	e, out, errs := s.env(strings.Fields(line)...)
	code = Run(ctx, e)
	return out.String(), errs.String(), code
}
