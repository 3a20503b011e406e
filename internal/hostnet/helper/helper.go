// Package helper is banger-nethelper: the only code of banger that holds a right the user has not,
// CAP_NET_ADMIN and CAP_NET_BIND_SERVICE. It answers the requests of internal/hostnet on a socketpair, touches nothing but
// bridges, TAP devices and one nftables table of banger's that belong to the user who started it,
// and ends when that socket closes, which the kernel does however the daemon dies.
package helper

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hostnet"
)

// requestTime bounds the work for one request. It is longer than a client waits, and ends a helper
// that hangs in the kernel's netlink.
const requestTime = 30 * time.Second

// Main is the whole program; it returns its exit code.
func Main() int {
	log := slog.New(newBoundedLog(slog.NewTextHandler(os.Stderr, nil), maxLog))
	// The daemon decides when this ends, by closing the socket; a terminal's Ctrl-C does not.
	signal.Ignore(syscall.SIGINT, syscall.SIGHUP)
	path, _ := os.Executable()
	os.Clearenv()
	if err := checkPeer(hostnet.HelperFD, os.Getuid()); err != nil {
		fmt.Fprintln(os.Stderr, "banger-nethelper: error:", err)
		fmt.Fprintln(os.Stderr, "banger-nethelper: hint: bangerd starts this program, and nobody else")
		return int(fault.Usage)
	}
	allowed, notAllowed := readAllowance(allowedFile) // before there are no files any more
	right, err := confine(log)
	if err != nil {
		log.Error("not confined", "reason", err)
		return int(fault.Unexpected)
	}
	h := &handler{uid: os.Getuid(), path: path, right: right, allowed: allowed, notAllowed: notAllowed, keeper: keeper{log: log}}
	socket := os.NewFile(hostnet.HelperFD, "daemon")
	if err := serve(socket, h.handle, log); err != nil {
		log.Error("ended", "reason", err)
		return int(fault.Unexpected)
	}
	return 0
}

// checkPeer makes sure that fd is a socket whose other end was made by the same user: file
// capabilities would serve whoever can execute this file, with a socket of anybody's.
func checkPeer(fd, uid int) error {
	peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fmt.Errorf("file descriptor %d is no socket of a daemon: %w", fd, err)
	}
	if int(peer.Uid) != uid {
		return fmt.Errorf("the daemon's user is %d, not %d", peer.Uid, uid)
	}
	return nil
}

// serve answers requests, one at a time, until the peer closes. A message that cannot be read is
// answered as well, and is the last: nobody knows where the next one begins.
func serve(socket io.ReadWriter, handle func(hostnet.Request) (hostnet.Response, error), log *slog.Logger) error {
	for {
		var request hostnet.Request
		if err := hostnet.ReadMessage(socket, &request); errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			return nil
		} else if err != nil {
			refused := fault.Wrap(fault.Usage, err, "the request cannot be read")
			return errors.Join(refused, hostnet.WriteMessage(socket, hostnet.Fail(refused)))
		}
		if err := reply(socket, answer(request, handle, log)); errors.Is(err, syscall.EPIPE) {
			return nil
		} else if err != nil {
			return fmt.Errorf("write the answer: %w", err)
		}
	}
}

// reply writes an answer, and the sockets that follow it.
func reply(socket io.Writer, response hostnet.Response) error {
	if err := hostnet.WriteMessage(socket, response); err != nil || response.Sockets == 0 {
		return err
	}
	conn, ok := socket.(syscall.Conn)
	if !ok {
		return errors.New("sockets can only be sent over a socket")
	}
	return hostnet.SendSockets(conn, response.Files())
}

func answer(request hostnet.Request, handle func(hostnet.Request) (hostnet.Response, error), log *slog.Logger) hostnet.Response {
	watchdog := time.AfterFunc(requestTime, func() {
		log.Error("a request hangs", "request", string(request.Op))
		os.Exit(int(fault.Timeout))
	})
	defer watchdog.Stop()
	err := request.Check()
	var response hostnet.Response
	if err == nil {
		response, err = handle(request)
	}
	if err != nil {
		log.Warn("refused", "request", string(request.Op), "bridge", request.Bridge, "tap", request.TAP, "reason", err)
		return hostnet.Fail(err)
	}
	response.Version = hostnet.ProtocolVersion
	return response
}

// handler carries requests out for one user.
type handler struct {
	uid   int
	path  string // of this program
	right bool   // CAP_NET_ADMIN; what already holds can be asked for without it

	allowed    allowance
	notAllowed error // why it is not known what is allowed: then nothing is
	keeper     keeper
}

func (h *handler) handle(r hostnet.Request) (response hostnet.Response, err error) {
	me := owner{h.uid, r.Instance}
	switch r.Op {
	case hostnet.OpCheck:
		err = h.check()
	case hostnet.OpEnsureBridge:
		if err = h.notAllowed; err == nil {
			err = h.allowed.check(r.Address, h.uid)
		}
		if err == nil {
			response, err = ensureBridge(r.Bridge, r.Address, me)
		}
	case hostnet.OpRemoveBridge:
		if err = h.keeper.remove(r.Bridge, me); err == nil {
			err = removeBridge(r.Bridge, me)
		}
	case hostnet.OpAddTAP:
		if r.Owner != h.uid {
			return response, fault.New(fault.Usage, "user %d asks for a TAP device of user %d", h.uid, r.Owner)
		}
		if r.TAP == "" {
			r.TAP, err = addFreeTAP(r.Bridge, me)
		} else {
			err = addTAP(r.TAP, r.Bridge, me)
		}
		response.TAPs = []string{r.TAP}
	case hostnet.OpDeleteTAP:
		err = deleteTAP(r.TAP, me)
	case hostnet.OpListTAPs:
		response.TAPs, err = listTAPs(me)
	case hostnet.OpSetRules:
		if len(r.Rules.Guests) == 0 && !h.right {
			break // there are none: nobody here could have made any
		}
		response, err = h.keeper.set(r.Bridge, *r.Rules, me)
	case hostnet.OpRemoveRules:
		err = h.keeper.remove(r.Bridge, me)
	case hostnet.OpListenDNS:
		response, err = listenDNS(r.Bridge, r.Address, me)
	}
	return response, h.explain(err)
}

// check finds what any change would fail of.
func (h *handler) check() error {
	if !h.right {
		return h.rightFault(errors.New("CAP_NET_ADMIN is missing"))
	}
	tun, err := os.OpenFile(tunDevice, os.O_RDWR, 0)
	if err != nil {
		return tunFault(err)
	}
	return tun.Close()
}

// explain turns what the kernel says when a right is missing into what helps.
func (h *handler) explain(err error) error {
	if err == nil || fault.KindOf(err) != fault.Unexpected || h.right && !errors.Is(err, os.ErrPermission) {
		return err
	}
	return h.rightFault(err)
}

func (h *handler) rightFault(err error) error {
	return fault.Wrap(fault.Precondition, err, "banger-nethelper lacks the right to set up networks").
		WithHint("%s   (or: make install)", hostnet.GrantHint(h.path))
}
