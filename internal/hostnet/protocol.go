package hostnet

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"banger/internal/fault"
)

// The protocol: the daemon writes a request, the helper a response, one at a time, on a socketpair
// that is the helper's file descriptor 3. Each message is four bytes of length, most significant
// first, and so many bytes of JSON.
const (
	// ProtocolVersion changes with every change of the protocol that an older peer would misread.
	ProtocolVersion = 2
	// HelperFD is the helper's end of the socketpair.
	HelperFD = 3
	// maxMessage bounds a message: a list of some thousands of TAP devices fits.
	maxMessage = 256 << 10
)

// Op names what is asked of the helper.
type Op string

// The operations, each with the fields of Request that it uses beside Bridge and Instance.
const (
	OpCheck        Op = "check"         // whether the helper could carry out the others
	OpEnsureBridge Op = "ensure_bridge" // Address
	OpRemoveBridge Op = "remove_bridge" // and its rules
	OpAddTAP       Op = "add_tap"       // TAP, Owner; without a name, one for the pool that nobody has: it is in the answer
	OpDeleteTAP    Op = "delete_tap"    // TAP
	OpListTAPs     Op = "list_taps"
	OpSetRules     Op = "set_rules" // Rules: all of the bridge's; none are taken away when it has no guests
	OpRemoveRules  Op = "remove_rules"
)

// Request asks the helper for a state.
type Request struct {
	Version  int          `json:"version"`
	Op       Op           `json:"op"`
	Bridge   string       `json:"bridge"`
	Instance string       `json:"instance,omitempty"`
	Address  netip.Prefix `json:"address,omitzero"` // the bridge's own, with the subnet's length
	TAP      string       `json:"tap,omitempty"`
	Owner    int          `json:"owner,omitempty"` // uid
	Rules    *Rules       `json:"rules,omitempty"`
}

// Response is the helper's answer.
type Response struct {
	Version int      `json:"version"`
	Error   *Failure `json:"error,omitempty"`
	TAPs    []string `json:"taps,omitempty"`
	Notices []string `json:"notices,omitempty"` // what this host keeps from being as it should be
	Opened  []string `json:"opened,omitempty"`  // chains of other firewalls in which VMs' packets are accepted
	Sockets int      `json:"sockets,omitempty"` // that follow; see OpListenDNS

	files []*os.File
}

// Failure is a fault on the wire.
type Failure struct {
	Kind string `json:"kind"`
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"`
}

// Check refuses a request that makes no sense or asks for what is not banger's.
func (r Request) Check() error {
	if r.Version != ProtocolVersion {
		return fault.New(fault.Precondition, "banger-nethelper speaks version %d of its protocol, the daemon version %d", ProtocolVersion, r.Version).
			WithHint("install both from the same build: make install")
	}
	if err := CheckBridge(r.Bridge); err != nil {
		return err
	}
	if err := CheckInstance(r.Instance); err != nil {
		return err
	}
	switch r.Op {
	case OpEnsureBridge, OpListenDNS:
		return checkAddress(r.Address)
	case OpAddTAP, OpDeleteTAP:
		if r.Op == OpAddTAP && r.TAP == "" {
			return nil
		}
		return CheckTAP(r.TAP)
	case OpSetRules:
		if r.Rules == nil {
			return fault.New(fault.Usage, "the request has no rules")
		}
		return r.Rules.Check()
	case OpCheck, OpListTAPs, OpRemoveRules, OpRemoveBridge:
		return nil
	}
	return fault.New(fault.Usage, "unknown request %q", clip(string(r.Op)))
}

func checkAddress(a netip.Prefix) error {
	if err := CheckSubnet(a.Masked()); err != nil {
		return err
	}
	if a != Gateway(a) {
		return fault.New(fault.Usage, "a bridge has the first address of its subnet, not %s", a)
	}
	return nil
}

func checkGuest(a netip.Addr) error {
	if a.Is4() && a.IsPrivate() {
		return nil
	}
	return fault.New(fault.Usage, "%s is no private IPv4 address", a)
}

// Fail puts an error into a response.
func Fail(err error) Response {
	return Response{Version: ProtocolVersion, Error: &Failure{Kind: fault.KindOf(err).String(), Text: err.Error(), Hint: fault.HintOf(err)}}
}

// Err returns the failure a response carries, or nil.
func (r Response) Err() error {
	if r.Error == nil {
		return nil
	}
	return fault.New(fault.ParseKind(r.Error.Kind), "%s", r.Error.Text).WithHint("%s", r.Error.Hint)
}

// WriteMessage writes one message.
func WriteMessage(w io.Writer, message any) error {
	body, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode a message: %w", err)
	}
	if len(body) > maxMessage {
		return fmt.Errorf("a message of %d bytes is longer than %d", len(body), maxMessage)
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	return err
}

// ReadMessage reads one message into message. It refuses long messages, unknown fields and trailing
// bytes. io.EOF says that the peer closed between two messages.
func ReadMessage(r io.Reader, message any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxMessage {
		return fmt.Errorf("a message of %d bytes is longer than %d", n, maxMessage)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return fmt.Errorf("read a message: %w", noEOF(err))
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(message); err != nil {
		return fmt.Errorf("decode a message: %w", noEOF(err))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("decode a message: bytes after its end")
	}
	return nil
}

// noEOF keeps a cut-off message from looking like an orderly end.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
