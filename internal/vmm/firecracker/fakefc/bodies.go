package fakefc

import "encoding/json"

// The bodies of requests, with the order and names of their fields as the API has them.

type hugePages string

func (hugePages) variants() []string { return []string{"None", "2M", "Transparent"} }

type cpuTemplate string

func (cpuTemplate) variants() []string {
	return []string{"C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"}
}

type machineConfig struct {
	VCPUs       uint8        `json:"vcpu_count" fc:"required"`
	MemoryMiB   uint64       `json:"mem_size_mib" fc:"required"`
	SMT         bool         `json:"smt"`
	CPUTemplate *cpuTemplate `json:"cpu_template,omitempty"`
	TrackDirty  bool         `json:"track_dirty_pages"`
	HugePages   hugePages    `json:"huge_pages" fc:"since=1.7"`
}

type machineUpdate struct {
	VCPUs       *uint8       `json:"vcpu_count"`
	MemoryMiB   *uint64      `json:"mem_size_mib"`
	SMT         *bool        `json:"smt"`
	CPUTemplate *cpuTemplate `json:"cpu_template"`
	TrackDirty  *bool        `json:"track_dirty_pages"`
	HugePages   *hugePages   `json:"huge_pages" fc:"since=1.7"`
}

type bootSource struct {
	Kernel string  `json:"kernel_image_path" fc:"required"`
	Initrd *string `json:"initrd_path"`
	Args   *string `json:"boot_args"`
}

type cpuConfig struct {
	KVM   *[]string          `json:"kvm_capabilities"`
	CPUID *[]json.RawMessage `json:"cpuid_modifiers"`
	MSR   *[]json.RawMessage `json:"msr_modifiers"`
}

type actionType string

func (actionType) variants() []string {
	return []string{"FlushMetrics", "InstanceStart", "SendCtrlAltDel"}
}

type action struct {
	Type actionType `json:"action_type" fc:"required"`
}

type vmState string

func (vmState) variants() []string { return []string{"Paused", "Resumed"} }

type stateChange struct {
	State vmState `json:"state" fc:"required"`
}

// tokenBucket takes unknown fields.
type tokenBucket struct {
	Size    uint64  `json:"size" fc:"required"`
	Burst   *uint64 `json:"one_time_burst"`
	RefillM uint64  `json:"refill_time" fc:"required"` // milliseconds
}

func (tokenBucket) loose() {}

type rateLimiter struct {
	Bandwidth *tokenBucket `json:"bandwidth"`
	Ops       *tokenBucket `json:"ops"`
}

type cacheType string

func (cacheType) variants() []string { return []string{"Unsafe", "Writeback"} }

type ioEngine string

func (ioEngine) variants() []string { return []string{"Sync", "Async"} }

type drive struct {
	ID       string       `json:"drive_id" fc:"required"`
	PartUUID *string      `json:"partuuid"`
	Root     bool         `json:"is_root_device" fc:"required"`
	Cache    cacheType    `json:"cache_type"`
	ReadOnly *bool        `json:"is_read_only"`
	Path     *string      `json:"path_on_host"`
	Limiter  *rateLimiter `json:"rate_limiter"`
	Engine   *ioEngine    `json:"io_engine"`
	Socket   *string      `json:"socket"`
}

func (d drive) readOnly() bool { return d.ReadOnly != nil && *d.ReadOnly }

type driveUpdate struct {
	ID      string       `json:"drive_id" fc:"required"`
	Path    *string      `json:"path_on_host"`
	Limiter *rateLimiter `json:"rate_limiter"`
}

type netInterface struct {
	ID  string       `json:"iface_id" fc:"required"`
	TAP string       `json:"host_dev_name" fc:"required"`
	MAC *string      `json:"guest_mac"`
	MTU *uint16      `json:"mtu" fc:"since=1.16"`
	RX  *rateLimiter `json:"rx_rate_limiter"`
	TX  *rateLimiter `json:"tx_rate_limiter"`
}

type netUpdate struct {
	ID string       `json:"iface_id" fc:"required"`
	RX *rateLimiter `json:"rx_rate_limiter"`
	TX *rateLimiter `json:"tx_rate_limiter"`
}

type vsockConfig struct {
	DeprecatedID *string `json:"vsock_id,omitempty"`
	CID          uint32  `json:"guest_cid" fc:"required"`
	Path         string  `json:"uds_path" fc:"required"`
}

type balloon struct {
	AmountMiB uint32 `json:"amount_mib" fc:"required"`
	Deflate   bool   `json:"deflate_on_oom" fc:"required"`
	Interval  uint16 `json:"stats_polling_interval_s"`
	Hinting   bool   `json:"free_page_hinting" fc:"since=1.14"`
	Reporting bool   `json:"free_page_reporting" fc:"since=1.14"`
}

type balloonUpdate struct {
	AmountMiB uint32 `json:"amount_mib" fc:"required"`
}

type balloonStatsUpdate struct {
	Interval uint16 `json:"stats_polling_interval_s" fc:"required"`
}

// hintingCommand takes unknown fields.
type hintingCommand struct {
	Acknowledge bool `json:"acknowledge_on_stop"`
}

func (hintingCommand) loose() {}

type entropy struct {
	Limiter *rateLimiter `json:"rate_limiter"`
}

type serialConfig struct {
	Path    *string      `json:"serial_out_path"`
	Limiter *tokenBucket `json:"rate_limiter" fc:"since=1.16"`
}

type loggerConfig struct {
	Path       *string `json:"log_path"`
	Level      *string `json:"level"` // any case; checked by hand
	ShowLevel  *bool   `json:"show_level"`
	ShowOrigin *bool   `json:"show_log_origin"`
	Module     *string `json:"module" fc:"since=1.6"`
}

// metricsConfig takes unknown fields.
type metricsConfig struct {
	Path       string            `json:"metrics_path" fc:"required"`
	EmitID     bool              `json:"emit_id" fc:"since=1.17"`
	Properties map[string]string `json:"properties" fc:"since=1.17"`
}

func (metricsConfig) loose() {}

type mmdsVersion string

func (mmdsVersion) variants() []string { return []string{"V1", "V2"} }

type mmdsConfig struct {
	Version    mmdsVersion `json:"version"`
	Interfaces []string    `json:"network_interfaces" fc:"required"`
	Address    *string     `json:"ipv4_address"`
	Compatible bool        `json:"imds_compat" fc:"since=1.13"`
}

type memoryHotplug struct {
	Total uint32  `json:"total_size_mib" fc:"required"`
	Block *uint32 `json:"block_size_mib"`
	Slot  *uint32 `json:"slot_size_mib"`
}

type memoryHotplugUpdate struct {
	Requested uint32 `json:"requested_size_mib" fc:"required"`
}

type pmem struct {
	ID       string       `json:"id" fc:"required"`
	Path     string       `json:"path_on_host" fc:"required"`
	Root     bool         `json:"root_device"`
	ReadOnly bool         `json:"read_only"`
	Limiter  *rateLimiter `json:"rate_limiter" fc:"since=1.16"`
}

type pmemUpdate struct {
	ID      string       `json:"id" fc:"required"`
	Limiter *rateLimiter `json:"rate_limiter"`
}

type snapshotType string

func (snapshotType) variants() []string { return []string{"Diff", "Full"} }

type snapshotCreate struct {
	Type   snapshotType `json:"snapshot_type"`
	State  string       `json:"snapshot_path" fc:"required"`
	Memory string       `json:"mem_file_path" fc:"required"`
}

type backendType string

func (backendType) variants() []string { return []string{"File", "Uffd"} }

type memoryBackend struct {
	Path string      `json:"backend_path" fc:"required"`
	Type backendType `json:"backend_type" fc:"required"`
}

type loadHugePages string

func (loadHugePages) variants() []string { return []string{"Snapshot", "None", "Transparent", "2M"} }

// networkOverride takes unknown fields.
type networkOverride struct {
	ID  string `json:"iface_id" fc:"required"`
	TAP string `json:"host_dev_name" fc:"required"`
}

func (networkOverride) loose() {}

// vsockOverride takes unknown fields.
type vsockOverride struct {
	Path string `json:"uds_path" fc:"required"`
}

func (vsockOverride) loose() {}

type snapshotLoad struct {
	State      string            `json:"snapshot_path" fc:"required"`
	Backend    *memoryBackend    `json:"mem_backend"`
	Memory     *string           `json:"mem_file_path"`
	EnableDiff bool              `json:"enable_diff_snapshots"`
	TrackDirty bool              `json:"track_dirty_pages" fc:"since=1.13"`
	Resume     bool              `json:"resume_vm"`
	Networks   []networkOverride `json:"network_overrides" fc:"since=1.12"`
	Vsock      *vsockOverride    `json:"vsock_override" fc:"since=1.16"`
	Clock      bool              `json:"clock_realtime" fc:"since=clock"`
	HugePages  loadHugePages     `json:"huge_pages" fc:"since=1.17"`
}
