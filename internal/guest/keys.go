package guest

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"golang.org/x/crypto/ssh"

	"banger/internal/fault"
)

// KeyPair is an ed25519 key: the private half as OpenSSH PEM, the public one in authorized_keys
// form without a line end.
type KeyPair struct {
	Private string
	Public  string
}

// NewKeyPair makes a key with a comment.
func NewKeyPair(comment string) (KeyPair, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return KeyPair{}, err
	}
	block, err := ssh.MarshalPrivateKey(private, comment)
	if err != nil {
		return KeyPair{}, err
	}
	k := KeyPair{Private: string(pem.EncodeToMemory(block))}
	k.Public, err = publicHalf(k.Private, comment)
	return k, err
}

func publicHalf(private, comment string) (string, error) {
	signer, err := ssh.ParsePrivateKey([]byte(private))
	if err != nil {
		return "", err
	}
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	return strings.TrimSpace(line + " " + comment), nil
}

// EnsureKeyFile returns the key in path, and makes it when there is none; the public half is kept
// beside it with ".pub" added. A file that is no private key is a Precondition fault: it is never overwritten.
func EnsureKeyFile(path, comment string) (KeyPair, error) {
	private, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return newKeyFile(path, comment)
	}
	if err != nil {
		return KeyPair{}, fault.Wrap(fault.Precondition, err, "cannot read the SSH key")
	}
	k := KeyPair{Private: string(private)}
	if k.Public, err = publicHalf(k.Private, comment); err != nil {
		return KeyPair{}, fault.Wrap(fault.Precondition, err, "%s is no private SSH key", path).
			WithHint("restore it, or remove it to have a new one made")
	}
	if have, err := os.ReadFile(path + ".pub"); err == nil && string(have) == k.Public+"\n" {
		return k, nil
	}
	return k, writeKey(path+".pub", k.Public+"\n")
}

func newKeyFile(path, comment string) (KeyPair, error) {
	k, err := NewKeyPair(comment)
	if err != nil {
		return KeyPair{}, err
	}
	if err := writeKey(path, k.Private); err != nil {
		return KeyPair{}, err
	}
	return k, writeKey(path+".pub", k.Public+"\n")
}

func writeKey(path, content string) error {
	if err := renameio.WriteFile(path, []byte(content), 0o600, renameio.IgnoreUmask()); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write the SSH key")
	}
	return nil
}

// CheckAuthorizedKey refuses what is no line of an authorized_keys file.
func CheckAuthorizedKey(line string) error {
	_, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil || len(rest) > 0 {
		return fault.New(fault.Usage, "%.80q is no public SSH key", line).
			WithHint("give one line as in ~/.ssh/id_ed25519.pub")
	}
	return nil
}

// KnownHost is one VM whose host key is known.
type KnownHost struct {
	Alias  string     // "web.vm": the HostKeyAlias
	Addr   netip.Addr // may be invalid
	Public string     // authorized_keys form
}

// KnownHosts renders a whole known_hosts file (sshd(8)), sorted, so that it can be written anew at
// every change.
func KnownHosts(hosts []KnownHost) []byte {
	lines := make([]string, 0, len(hosts))
	for _, h := range hosts {
		fields := strings.Fields(h.Public)
		if len(fields) < 2 {
			continue
		}
		names := h.Alias
		if h.Addr.IsValid() {
			names += "," + h.Addr.String()
		}
		lines = append(lines, fmt.Sprintf("%s %s %s\n", names, fields[0], fields[1]))
	}
	slices.Sort(lines)
	return []byte("# Written by bangerd at every change.\n" + strings.Join(lines, ""))
}

// NewMachineID returns a random machine id with the marks of a version 4 UUID (machine-id(5)).
func NewMachineID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand.Read ends the program instead
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return hex.EncodeToString(b[:])
}
