package cli

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "banger/api/banger/v1"
)

// The JSON forms. docs/json.md lists every key; keys are only ever added, and all are always there.

type vmView struct {
	ID            string     `json:"id"`
	Name          string     `json:"name"`
	State         string     `json:"state"`
	Image         string     `json:"image"`
	Kernel        string     `json:"kernel"`
	VMM           string     `json:"vmm"`
	CPUs          int32      `json:"cpus"`
	MemoryBytes   int64      `json:"memory_bytes"`
	DiskBytes     int64      `json:"disk_bytes"`
	WorkDiskBytes int64      `json:"work_disk_bytes"`
	IP            string     `json:"ip"`
	MAC           string     `json:"mac"`
	DNSName       string     `json:"dns_name"`
	NAT           bool       `json:"nat"`
	CreatedAt     *time.Time `json:"created_at"`
	StartedAt     *time.Time `json:"started_at"`
	Error         string     `json:"error"`
	Units         string     `json:"units"`
	Ephemeral     bool       `json:"ephemeral"`
	Accelerator   string     `json:"accelerator"`
	SlowReason    string     `json:"slow_reason"`
	PID           int32      `json:"pid"`
	Directory     string     `json:"directory"`
	Ports         []portView `json:"ports"`
	IP6           string     `json:"ip6"`
	Isolated      bool       `json:"isolated"`
	DiskRate      int64      `json:"disk_rate"`
	NetRate       int64      `json:"net_rate"`
	Balloon       bool       `json:"balloon"`
}

func viewVM(v *bangerv1.VM) vmView {
	return vmView{
		ID: v.GetId(), Name: v.GetName(), State: v.GetState(), Image: v.GetImage(), Kernel: v.GetKernel(), VMM: v.GetVmm(),
		CPUs: v.GetCpus(), MemoryBytes: v.GetMemoryBytes(), DiskBytes: v.GetDiskBytes(), WorkDiskBytes: v.GetWorkDiskBytes(),
		IP: v.GetIp(), MAC: v.GetMac(), DNSName: v.GetDnsName(), NAT: v.GetNat(),
		CreatedAt: viewTime(v.GetCreatedAt()), StartedAt: viewTime(v.GetStartedAt()), Error: v.GetError(),
		Units: v.GetUnits(), Ephemeral: v.GetEphemeral(), Accelerator: v.GetAccelerator(), SlowReason: v.GetSlowReason(),
		PID: v.GetPid(), Directory: v.GetDirectory(), Ports: views(v.GetPorts(), viewPort),
		IP6: v.GetIp6(), Isolated: v.GetIsolated(),
		DiskRate: v.GetDiskRate(), NetRate: v.GetNetRate(), Balloon: v.GetBalloon(),
	}
}

type imageView struct {
	Name          string     `json:"name"`
	Digest        string     `json:"digest"`
	Description   string     `json:"description"`
	Architecture  string     `json:"architecture"`
	SizeBytes     int64      `json:"size_bytes"`
	WorkSeedBytes int64      `json:"work_seed_bytes"`
	PackageCount  int32      `json:"package_count"`
	CreatedAt     *time.Time `json:"created_at"`
	IsDefault     bool       `json:"is_default"`
	DefaultFrom   string     `json:"default_from"`
	UsedBy        []string   `json:"used_by"`
	Problem       string     `json:"problem"`
	Directory     string     `json:"directory"`
	Aliases       []string   `json:"aliases"`
	Source        string     `json:"source"`
	SourceDigest  string     `json:"source_digest"`
	Skipped       []string   `json:"skipped"`
	Notice        string     `json:"notice"`

	Build *imageBuildView `json:"build"`
}

func viewImage(i *bangerv1.Image) imageView {
	return imageView{
		Build: viewImageBuild(i.GetBuild()),

		Name: i.GetName(), Digest: i.GetDigest(), Description: i.GetDescription(), Architecture: i.GetArchitecture(),
		SizeBytes: i.GetSizeBytes(), WorkSeedBytes: i.GetWorkSeedBytes(), PackageCount: i.GetPackageCount(),
		CreatedAt: viewTime(i.GetCreatedAt()), IsDefault: i.GetIsDefault(), UsedBy: list(i.GetUsedBy()),
		Problem: i.GetProblem(), Directory: i.GetDirectory(), Aliases: list(i.GetAliases()), Source: i.GetSource(),
		SourceDigest: i.GetSourceDigest(), Skipped: list(i.GetSkipped()), Notice: i.GetNotice(), DefaultFrom: i.GetDefaultFrom(),
	}
}

type kernelView struct {
	Name         string `json:"name"`
	Release      string `json:"release"`
	Architecture string `json:"architecture"`
	SizeBytes    int64  `json:"size_bytes"`
	IsDefault    bool   `json:"is_default"`
	DefaultFrom  string `json:"default_from"`
	Problem      string `json:"problem"`
	Directory    string `json:"directory"`

	UsedBy    []string   `json:"used_by"`
	CreatedAt *time.Time `json:"created_at"`
	Source    string     `json:"source"`
	Formats   []string   `json:"formats"`
	Version   string     `json:"version"`
}

func viewKernel(k *bangerv1.Kernel) kernelView {
	return kernelView{
		Name: k.GetName(), Release: k.GetRelease(), Architecture: k.GetArchitecture(), SizeBytes: k.GetSizeBytes(),
		IsDefault: k.GetIsDefault(), Problem: k.GetProblem(), Directory: k.GetDirectory(), UsedBy: list(k.GetUsedBy()),
		CreatedAt: viewTime(k.GetCreatedAt()), Source: k.GetSource(), Formats: list(k.GetFormats()), Version: k.GetVersion(),
		DefaultFrom: k.GetDefaultFrom(),
	}
}

type driverView struct {
	Name        string `json:"name"`
	Available   bool   `json:"available"`
	Version     string `json:"version"`
	Accelerator string `json:"accelerator"`
	Reason      string `json:"reason"`
}

type daemonView struct {
	Running          bool          `json:"running"`
	APIVersion       int32         `json:"api_version"`
	Build            string        `json:"build"`
	PID              int32         `json:"pid"`
	StartedAt        *time.Time    `json:"started_at"`
	StateDirectory   string        `json:"state_directory"`
	Socket           string        `json:"socket"`
	VMCount          int32         `json:"vm_count"`
	RunningCount     int32         `json:"running_count"`
	Drivers          []driverView  `json:"drivers"`
	DefaultVMM       string        `json:"default_vmm"`
	DefaultVMMReason string        `json:"default_vmm_reason"`
	Reconciled       []string      `json:"reconciled"`
	Subnet           string        `json:"subnet"`
	Bridge           string        `json:"bridge"`
	DNS              dnsDaemonView `json:"dns"`
	Network          networkView   `json:"network"`
}

// networkView is what there is of the host's network for VMs.
type networkView struct {
	Subnet6       string   `json:"subnet6"`
	SubnetProblem string   `json:"subnet_problem"`
	TAPsReady     int32    `json:"taps_ready"`
	TAPsWanted    int32    `json:"taps_wanted"`
	Notices       []string `json:"notices"`
	OpenedChains  []string `json:"opened_chains"`
}

func viewNetwork(n *bangerv1.NetworkStatus) networkView {
	return networkView{
		Subnet6: n.GetSubnet6(), SubnetProblem: n.GetSubnetProblem(), TAPsReady: n.GetTapsReady(), TAPsWanted: n.GetTapsWanted(),
		Notices: list(n.GetNotices()), OpenedChains: list(n.GetOpenedChains()),
	}
}

// dnsDaemonView is where the daemon serves names.
type dnsDaemonView struct {
	Zone      string `json:"zone"`
	Listener  string `json:"listener"`
	Forwarder string `json:"forwarder"`
	Records   int32  `json:"records"`
	Problem   string `json:"problem"`
}

func viewDNS(d *bangerv1.DNSStatus) dnsDaemonView {
	return dnsDaemonView{
		Zone: d.GetZone(), Listener: d.GetListener(), Forwarder: d.GetForwarder(), Records: d.GetRecords(), Problem: d.GetProblem(),
	}
}

func viewDaemon(s *bangerv1.GetStatusResponse, socket string) daemonView {
	v := daemonView{
		Running: s != nil, APIVersion: s.GetApiVersion(), Build: s.GetBuild(), PID: s.GetPid(),
		StartedAt: viewTime(s.GetStartedAt()), StateDirectory: s.GetStateDirectory(), Socket: socket,
		VMCount: s.GetVmCount(), RunningCount: s.GetRunningCount(), Drivers: []driverView{},
		DefaultVMM: s.GetDefaultVmm(), DefaultVMMReason: s.GetDefaultVmmReason(), Reconciled: list(s.GetReconciled()),
		Subnet: s.GetSubnet(), Bridge: s.GetBridge(), DNS: viewDNS(s.GetDns()), Network: viewNetwork(s.GetNetwork()),
	}
	for _, d := range s.GetDrivers() {
		v.Drivers = append(v.Drivers, driverView{
			Name: d.GetName(), Available: d.GetAvailable(), Version: d.GetVersion(),
			Accelerator: d.GetAccelerator(), Reason: d.GetReason(),
		})
	}
	return v
}

type pingView struct {
	Name             string  `json:"name"`
	RoundTripSeconds float64 `json:"round_trip_seconds"`
	AgentBuild       string  `json:"agent_build"`
	BootID           string  `json:"boot_id"`
	UptimeSeconds    float64 `json:"uptime_seconds"`
}

type deletedView struct {
	Name string `json:"name"`
}

type setupView struct {
	Image       imageView  `json:"image"`
	Kernel      kernelView `json:"kernel"`
	AlreadyDone bool       `json:"already_done"`
}

type versionView struct {
	Build         string `json:"build"`
	DaemonBuild   string `json:"daemon_build"`
	DaemonProblem string `json:"daemon_problem"`
	Go            string `json:"go"`
	OS            string `json:"os"`
	Architecture  string `json:"architecture"`
}

type checkView struct {
	Name    string `json:"name"`
	Status  string `json:"status"`
	Message string `json:"message"`
	Hint    string `json:"hint"`
}

type doctorView struct {
	OK     bool        `json:"ok"`
	Checks []checkView `json:"checks"`
}

// viewTime returns UTC, so that two machines print the same; nil when t is unset.
func viewTime(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	u := t.AsTime().UTC()
	return &u
}

// list makes an empty list of a nil one: JSON shows [] and not null.
func list(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

func views[P, V any](in []P, view func(P) V) []V {
	out := make([]V, len(in))
	for i, p := range in {
		out[i] = view(p)
	}
	return out
}
