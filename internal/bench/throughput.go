package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"banger/internal/paths"
	"banger/internal/system"
)

// What a guest sends to the host over TCP, in one connection that the host opens: guests may open none to it.
const (
	streamBytes  = 64 << 20
	streamRounds = 6
	streamSettle = 20 * time.Second // after both have started: a guest that still boots slows the other
	streamPort   = "7000"
	streamTAP    = "bench0"
	streamServer = "systemd-socket-activate --listen=" + streamPort + " --accept --inetd head -c 64M /dev/zero"
)

// throughput compares what a VM sends with what the baseline sends over the same bridge, in turns.
func (b *bench) throughput(ctx context.Context) (err error) {
	s, e, err := b.baseline(ctx)
	if err != nil {
		return err
	}
	if err := b.real.create(ctx, "stream"); err != nil {
		return err
	}
	v, err := b.real.show(ctx, "stream")
	if err != nil {
		return err
	}
	start := "systemd-run --quiet " + streamServer
	if err := b.real.banger(ctx, nil, "vm", "exec", "stream", "--", "sh", "-c", start); err != nil {
		return err
	}
	ip, err := netip.ParseAddr(v.IP)
	if err != nil {
		return err
	}
	bytes := ip.As4()
	stockIP := netip.AddrFrom4([4]byte{bytes[0], bytes[1], 255, 9})
	end, err := s.onBridge(ctx, e, stockIP)
	if err != nil {
		return err
	}
	defer end()
	var ours, theirs []float64
	sides := []streamSide{{stockIP.String(), &theirs}, {v.IP, &ours}}
	for round := range streamRounds + 1 {
		for _, side := range sides {
			took, err := stream(ctx, side.address)
			if err != nil {
				return err
			}
			if round > 0 { // the first one waits for the guest, and warms what translates its code
				*side.took = append(*side.took, took)
			}
		}
		slices.Reverse(sides) // who comes first finds another machine
		if round == 0 {
			if err := rest(ctx, streamSettle); err != nil {
				return err
			}
		}
	}
	base := b.add(measured("guest to host over TCP, a plain QEMU on the same bridge", "s for 64 MiB", 0, theirs...))
	b.add(measured("guest to host over TCP", "s for 64 MiB", 0, ours...).against(base, 1.25))
	return b.real.remove(ctx, "stream")
}

// streamSide is one of the two guests, and what its streams took.
type streamSide struct {
	address string
	took    *[]float64
}

// stream reads all that a guest sends and returns the seconds from its first byte to its last.
func stream(ctx context.Context, address string) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(address, streamPort))
		if err == nil {
			defer conn.Close()
			return drain(ctx, conn)
		}
		if err := rest(ctx, 200*time.Millisecond); err != nil {
			return 0, fmt.Errorf("no stream from %s: %w", address, err)
		}
	}
}

func drain(ctx context.Context, conn net.Conn) (float64, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		return 0, fmt.Errorf("read a stream: %w", err)
	}
	begin := time.Now()
	n, err := io.Copy(io.Discard, conn)
	if err != nil || n+1 != streamBytes {
		return 0, fmt.Errorf("a stream of %d bytes, not %d: %w", n+1, streamBytes, err)
	}
	return time.Since(begin).Seconds(), nil
}

// onBridge starts the baseline with an address on the bridge of banger's VMs, and a server that streams.
func (s stock) onBridge(ctx context.Context, e emulation, ip netip.Addr) (end func(), err error) {
	qemu, err := system.Find("qemu-system-x86_64", "qemu-system-x86")
	if err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"tuntap", "add", "dev", streamTAP, "mode", "tap", "vnet_hdr"}, {"link", "set", streamTAP, "master", paths.Bridge, "up"},
	} {
		if _, err := system.Run(ctx, system.Command{Path: "ip", Args: args, Timeout: 10 * time.Second}); err != nil {
			return nil, err
		}
	}
	prepare := fmt.Sprintf("/bin/sh -c 'ip addr add %s/16 dev eth0; ip link set eth0 up; exec %s'", ip, streamServer)
	p, err := system.Start(system.StartOptions{
		Path: qemu, Dir: s.dir, Log: filepath.Join(s.dir, "stream.log"),
		// As VMs have it: on a machine that does other things as well, the kernel gives each session its share of the CPUs
		// (sched(7), autogroup). In ours, with who reads the stream, it took less than half of the time.
		NewSession: true,
		Args: []string{
			"-M", "q35", "-accel", e.accel, "-cpu", e.cpu, "-smp", fmt.Sprint(benchCPUs), "-m", fmt.Sprint(benchMiB),
			"-nodefaults", "-display", "none", "-no-reboot", "-serial", "file:stream-serial.log",
			"-kernel", "vmlinuz", "-initrd", "initrd.img",
			"-append", `root=/dev/vda ro console=ttyS0 quiet net.ifnames=0 systemd.run_success_action=none systemd.run="` + prepare + `"`,
			"-drive", "file=root.ext4,format=raw,if=virtio,snapshot=on",
			"-netdev", "tap,id=n0,ifname=" + streamTAP + ",script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0",
			"-device", "virtio-rng-pci",
		},
	})
	if err != nil {
		return nil, err
	}
	return func() {
		_ = p.Signal(killSignal)
		<-p.Done()
		_ = p.Close()
		_, _ = system.Run(context.WithoutCancel(ctx), system.Command{Path: "ip", Args: []string{"link", "delete", streamTAP}, Timeout: 10 * time.Second})
	}, nil
}
