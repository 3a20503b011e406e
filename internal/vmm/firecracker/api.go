package firecracker

import (
	"context"
	"net/http"
	"time"
)

// Bodies of the API, with the fields that are sent and no others: a field that a version does not know is refused.

type machineConfig struct {
	CPUs      int   `json:"vcpu_count"`
	MemoryMiB int64 `json:"mem_size_mib"`
}

type bootSource struct {
	Kernel string `json:"kernel_image_path"`
	Args   string `json:"boot_args"`
	Initrd string `json:"initrd_path,omitempty"`
}

type drive struct {
	ID       string `json:"drive_id"`
	Path     string `json:"path_on_host"`
	Root     bool   `json:"is_root_device"` // never: it would set root= on the guest's command line
	ReadOnly bool   `json:"is_read_only"`
	Cache    string `json:"cache_type,omitempty"`
	Limit    *limit `json:"rate_limiter,omitempty"`
}

// writeback lets a guest's flush reach the disk.
const writeback = "Writeback"

type drivePatch struct {
	ID    string `json:"drive_id"`
	Path  string `json:"path_on_host,omitempty"`
	Limit *limit `json:"rate_limiter,omitempty"`
}

type networkInterface struct {
	ID  string `json:"iface_id"`
	TAP string `json:"host_dev_name"`
	MAC string `json:"guest_mac,omitempty"`
	RX  *limit `json:"rx_rate_limiter,omitempty"`
	TX  *limit `json:"tx_rate_limiter,omitempty"`
}

type networkPatch struct {
	ID string `json:"iface_id"`
	RX *limit `json:"rx_rate_limiter"`
	TX *limit `json:"tx_rate_limiter"`
}

// limit bounds bytes a second.
type limit struct {
	Bandwidth bucket `json:"bandwidth"`
}

// bucket is full at first. One of size 0 limits nothing, which is how a limit is taken away.
type bucket struct {
	Size   int64 `json:"size"`
	Refill int64 `json:"refill_time"` // milliseconds from empty to full
}

// limitOf holds one second's worth: a smaller bucket is full before Firecracker looks again, and less than the
// rate gets through.
func limitOf(rate int64) *limit { return &limit{bucket{Size: rate, Refill: 1000}} }

// limited is limitOf a new device, which needs none for rate 0.
func limited(rate int64) *limit {
	if rate == 0 {
		return nil
	}
	return limitOf(rate)
}

// balloon is never inflated from outside. What the guest reports as free since 1.14 is taken back at once, and what it
// needs again it has again.
type balloon struct {
	MiB          int  `json:"amount_mib"`
	DeflateOnOOM bool `json:"deflate_on_oom"`
	Reporting    bool `json:"free_page_reporting"`
}

type vsockDevice struct {
	CID  uint32 `json:"guest_cid"`
	Path string `json:"uds_path"`
}

type entropyDevice struct{}

type action struct {
	Type string `json:"action_type"`
}

type vmState struct {
	State string `json:"state"`
}

type snapshotCreate struct {
	State  string `json:"snapshot_path"`
	Memory string `json:"mem_file_path"`
}

type snapshotLoad struct {
	State     string            `json:"snapshot_path"`
	Memory    memoryBackend     `json:"mem_backend"`
	Resume    bool              `json:"resume_vm"`
	Overrides []networkOverride `json:"network_overrides,omitempty"` // since 1.12
}

type memoryBackend struct {
	Type string `json:"backend_type"`
	Path string `json:"backend_path"`
}

type networkOverride struct {
	ID  string `json:"iface_id"`
	TAP string `json:"host_dev_name"`
}

// Words of GET /'s state.
const (
	stateNotStarted = "Not started"
	stateRunning    = "Running"
	statePaused     = "Paused"
)

func (c *client) put(ctx context.Context, path string, body any) error {
	return c.call(ctx, callTimeout, http.MethodPut, path, body, nil)
}

// state returns one of the words above.
func (c *client) state(ctx context.Context) (string, error) {
	var info struct {
		State string `json:"state"`
	}
	err := c.call(ctx, callTimeout, http.MethodGet, "/", nil, &info)
	return info.State, err
}

// version returns the version of the process that answers.
func (c *client) version(ctx context.Context) (version, error) {
	var info struct {
		Version string `json:"firecracker_version"`
	}
	if err := c.call(ctx, callTimeout, http.MethodGet, "/version", nil, &info); err != nil {
		return version{}, err
	}
	return parseVersion(info.Version)
}

func (c *client) instanceStart(ctx context.Context) error {
	return c.call(ctx, startTimeout, http.MethodPut, "/actions", action{"InstanceStart"}, nil)
}

// ctrlAltDel queues the keystrokes; it says nothing about what the guest makes of them.
func (c *client) ctrlAltDel(ctx context.Context) error {
	return c.put(ctx, "/actions", action{"SendCtrlAltDel"})
}

// setState pauses ("Paused") or resumes ("Resumed"); both succeed when it already is so.
func (c *client) setState(ctx context.Context, state string) error {
	return c.call(ctx, callTimeout, http.MethodPatch, "/vm", vmState{state}, nil)
}

// create writes a snapshot of a paused guest with that much memory.
func (c *client) create(ctx context.Context, s snapshotCreate, memoryBytes int64) error {
	limit := createTimeout + time.Duration(memoryBytes/createPace)*time.Second
	return c.call(ctx, limit, http.MethodPut, "/snapshot/create", s, nil)
}

// load restores a snapshot. After an error the process ends.
func (c *client) load(ctx context.Context, l snapshotLoad) error {
	return c.call(ctx, loadTimeout, http.MethodPut, "/snapshot/load", l, nil)
}

// patchDrive changes a drive's limit or, given its path, has Firecracker look at its size again and tell the guest.
func (c *client) patchDrive(ctx context.Context, p drivePatch) error {
	return c.call(ctx, callTimeout, http.MethodPatch, "/drives/"+p.ID, p, nil)
}

func (c *client) patchNetwork(ctx context.Context, p networkPatch) error {
	return c.call(ctx, callTimeout, http.MethodPatch, "/network-interfaces/"+p.ID, p, nil)
}
