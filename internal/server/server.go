// Package server answers the API: it turns requests into the engine's verbs and their progress
// into streams. It knows nothing of sockets and processes; package daemon serves its handler.
package server

import (
	"context"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"banger/api/agent/v1/agentv1connect"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/build"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/store"
	"banger/internal/vm"
)

// Limits on what one message may hold.
const (
	maxRequest = 1 << 20
	maxExec    = 4 << 20 // a chunk of a program's input
)

// Engine is what the handlers need of the engine; *engine.Engine has it but for Agent's type.
type Engine interface {
	Verbs
	Forks
	Get(ctx context.Context, ref string) (vm.VM, error)
	List(ctx context.Context) ([]vm.VM, error)
	Events(ctx context.Context, ref string, limit int) ([]store.Event, error)
	// Agent returns the client of a running VM's agent; the caller does not close it.
	Agent(ctx context.Context, ref string) (agentv1connect.AgentServiceClient, error)
}

// Verbs change VMs.
type Verbs interface {
	Create(ctx context.Context, spec vm.Spec, start bool, sink progress.Sink) (vm.VM, error)
	// Start resumes a suspended VM and boots any other; Boot never resumes, and Resume does nothing else.
	Start(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error)
	Boot(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error)
	Resume(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error)
	// SetVMM says under which VMM a VM that is stopped is started from then on.
	SetVMM(ctx context.Context, ref, vmm string) error
	Suspend(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error)
	Stop(ctx context.Context, ref string, force bool, sink progress.Sink) (vm.VM, error)
	Restart(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error)
	Delete(ctx context.Context, ref string, force bool, sink progress.Sink) error
	// Set changes the spec as change does, and what runs with it.
	Set(ctx context.Context, ref string, change func(*vm.Spec)) (vm.VM, error)
}

// Options is what a server is made of.
type Options struct {
	Engine    Engine
	Images    Images
	Kernels   Kernels
	Templates Templates
	Snapshots Snapshots
	Ports     Ports
	Setup     Setup
	Builds    Builds
	Paths     paths.Paths
	Defaults  vm.Spec // of VMs; the configuration's
	Named     Named   // where it names some of them
	Logger    *slog.Logger
	// Host tells about the daemon and the machine it runs on.
	Host func(context.Context) Host
	// Shutdown begins the daemon's end and returns at once.
	Shutdown func()
	// Gate opens when the engine has reconciled; calls wait for it. Nil: open.
	Gate *Gate
	// Closing is closed when the daemon begins to end: streams are cancelled then. Nil: never.
	Closing <-chan struct{}
}

// Host is what the daemon knows of itself and its machine.
type Host struct {
	PID              int
	StartedAt        time.Time
	Drivers          []Driver
	DefaultVMM       string // the driver that "auto" stands for; empty when none can be used
	DefaultVMMReason string
	Reconciled       []string
	Subnet           string
	Bridge           string
	DNS              DNS
	Network          Network
}

// DNS is where names of VMs are served.
type DNS struct {
	Zone                string
	Listener, Forwarder string // address and port; empty: it does not listen
	Records             int
	Problem             string // what keeps it from its work, with what to do
}

// Network is what there is of the host's network for VMs; see bangerv1.NetworkStatus.
type Network struct {
	Subnet6, SubnetProblem string
	TAPsReady, TAPsWanted  int
	Notices, OpenedChains  []string
}

// Driver is what one driver can do here.
type Driver struct {
	Name, Version, Accelerator string
	Available                  bool
	Reason                     string // why it cannot be used, or why it is slow, or what is wrong with it
}

type service struct{ Options }

// New returns the handler of the whole API.
func New(o Options) http.Handler {
	s := &service{o}
	guard := &interceptor{logger: o.Logger, gate: o.Gate, closing: o.Closing}
	with := connect.WithHandlerOptions(
		connect.WithInterceptors(guard),
		connect.WithConditionalHandlerOptions(limits),
	)
	mux := http.NewServeMux()
	mux.Handle(bangerv1connect.NewVMServiceHandler(vmService{s}, with))
	mux.Handle(bangerv1connect.NewImageServiceHandler(&imageService{service: s}, with))
	mux.Handle(bangerv1connect.NewBuildServiceHandler(buildService{s}, with))
	mux.Handle(bangerv1connect.NewTemplateServiceHandler(templateService{s}, with))
	mux.Handle(bangerv1connect.NewSnapshotServiceHandler(snapshotService{s}, with))
	mux.Handle(bangerv1connect.NewNetworkServiceHandler(networkService{s}, with))
	mux.Handle(bangerv1connect.NewDaemonServiceHandler(daemonService{s}, with))
	mux.HandleFunc("GET /hello", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	return introduce(mux)
}

func limits(spec connect.Spec) []connect.HandlerOption {
	if spec.Procedure == bangerv1connect.VMServiceExecVMProcedure {
		return []connect.HandlerOption{connect.WithReadMaxBytes(maxExec)}
	}
	return []connect.HandlerOption{connect.WithReadMaxBytes(maxRequest)}
}

// introduce tells on every answer, also to a malformed request, which daemon this is: clients
// compare the build with their own.
func introduce(next http.Handler) http.Handler {
	id, api := build.ID(), strconv.Itoa(build.API)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Banger-Build", id)
		w.Header().Set("Banger-Api", api)
		next.ServeHTTP(w, r)
	})
}
