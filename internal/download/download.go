// Package download fetches files over HTTP whose checksum is known beforehand. What arrived is kept under that checksum
// until the file is whole, so that an interrupted download goes on where it stopped, and nothing is handed out that was not
// verified.
package download

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"

	"banger/internal/artifact"
	"banger/internal/build"
	"banger/internal/fault"
)

// Bounds, unless the options say others.
const (
	DefaultLimit = 8 << 30 // bytes of a file
	DefaultIdle  = 30 * time.Second
	attempts     = 4 // without a single new byte; each that brings some begins the count anew
	maxAttempts  = 100
	firstPause   = time.Second
	textLimit    = 64 << 10 // bytes of what Text fetches
	maxRedirects = 10
	keepUnused   = 7 * 24 * time.Hour
)

// Options of a download. The zero value of each field means its default.
type Options struct {
	Dir      string        // where incomplete and whole files are kept; needed by File
	SHA256   string        // 64 hex digits; needed by File
	Limit    int64         // most bytes
	Idle     time.Duration // how long nothing may come
	Pause    time.Duration // before the second attempt; doubled each time
	Progress func(done, total int64)
}

var sumPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// CheckSum refuses what is no SHA-256 in lower-case hex.
func CheckSum(sum string) error {
	if sumPattern.MatchString(sum) {
		return nil
	}
	return fault.New(fault.Usage, "%q is no SHA-256 checksum", sum).WithHint("it has 64 hexadecimal digits in lower case")
}

// File fetches the file at address and returns its path in o.Dir, once it has the checksum o.SHA256. The caller removes it
// when it is done with it. A server that breaks off is asked again for the rest. The errors: Precondition for what the server or
// network refuse and for a full disk, NotFound when there is no such file, Timeout when nothing comes, Conflict when
// another process fetches it right now.
func File(ctx context.Context, address string, o Options) (path string, err error) {
	if err := errors.Join(checkAddress(address), CheckSum(o.SHA256)); err != nil {
		return "", err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return "", fault.Wrap(fault.Precondition, err, "cannot make directory %s", o.Dir)
	}
	t := &transfer{o: o.withDefaults(), address: address, client: newClient(), path: filepath.Join(o.Dir, o.SHA256)}
	lock := flock.New(t.path+".lock", flock.SetPermissions(0o600))
	if held, err := lock.TryLock(); err != nil || !held {
		return "", fault.Wrap(fault.Conflict, err, "%s is being downloaded by another banger", address).WithHint("wait until that is done")
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	now := time.Now()
	_ = os.Chtimes(lock.Path(), now, now) // else forgetOld may take it away from under us
	forgetOld(o.Dir)
	return t.path, t.run(ctx)
}

// forgetOld removes what was begun long ago and never finished, or never fetched by who wanted it.
func forgetOld(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return // the download itself will tell
	}
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && info.Mode().IsRegular() && sumPattern.MatchString(strings.TrimSuffix(strings.TrimSuffix(e.Name(), ".part"), ".lock")) &&
			time.Since(info.ModTime()) > keepUnused {
			_ = os.Remove(filepath.Join(dir, e.Name())) // the next one tries again
		}
	}
}

// Text fetches a small text, such as a file of checksums.
func Text(ctx context.Context, address string, o Options) (string, error) {
	if err := checkAddress(address); err != nil {
		return "", err
	}
	t := &transfer{o: o.withDefaults(), address: address, client: newClient()}
	var text []byte
	err := t.attempt(ctx, func(ctx context.Context) (bool, error) {
		return t.get(ctx, 0, func(r *http.Response, body io.Reader) (err error) {
			if r.StatusCode != http.StatusOK {
				return statusFault(r, address)
			}
			text, err = io.ReadAll(io.LimitReader(body, textLimit+1))
			if err == nil && len(text) > textLimit {
				err = fault.New(fault.Precondition, "%s is larger than %d bytes", address, textLimit)
			}
			return err
		})
	})
	return string(text), err
}

func (o Options) withDefaults() Options {
	if o.Limit == 0 {
		o.Limit = DefaultLimit
	}
	if o.Idle == 0 {
		o.Idle = DefaultIdle
	}
	if o.Pause == 0 {
		o.Pause = firstPause
	}
	if o.Progress == nil {
		o.Progress = func(int64, int64) {}
	}
	return o
}

// checkAddress refuses what is no HTTP address. Users' names and passwords would appear in messages.
func checkAddress(address string) error {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || strings.ContainsAny(address, "\n\r ") {
		return fault.New(fault.Usage, "%q is no address to download from", address).WithHint("it begins with https://")
	}
	return nil
}

func newClient() *http.Client {
	dialer := &net.Dialer{Timeout: 15 * time.Second}
	return &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext, TLSHandshakeTimeout: 15 * time.Second,
			DisableCompression: true, DisableKeepAlives: true, ForceAttemptHTTP2: true,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) >= maxRedirects {
				return fault.New(fault.Precondition, "more than %d redirections", maxRedirects)
			}
			if r.URL.Scheme != "https" && (r.URL.Scheme != "http" || via[0].URL.Scheme == "https") {
				return fault.New(fault.Precondition, "redirected from %s to %s", via[0].URL.Scheme, r.URL.Scheme).
					WithHint("nothing was fetched from there; give another address")
			}
			return nil
		},
	}
}

// transfer is one download.
type transfer struct {
	o       Options
	address string
	client  *http.Client
	path    string // of the whole file; the incomplete one has ".part" added
}

func (t *transfer) run(ctx context.Context) error {
	if sum, _, err := artifact.Sum(t.path); err == nil && sum == t.o.SHA256 {
		return nil // an earlier run had got this far
	}
	err := t.attempt(ctx, t.once)
	var wrong *wrongSum
	if errors.As(err, &wrong) && wrong.resumed {
		// What was there already may be what is wrong.
		err = t.attempt(ctx, t.once)
	}
	return err
}

// attempt calls once until it succeeds, fails for good, or brings nothing several times.
func (t *transfer) attempt(ctx context.Context, once func(context.Context) (progress bool, err error)) error {
	pause, left := t.o.Pause, attempts
	for range maxAttempts {
		progress, err := once(ctx)
		var lasting *fault.Error
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.As(err, &lasting):
			return err
		case progress:
			pause, left = t.o.Pause, attempts
		}
		if left--; left <= 0 {
			return networkFault(err, t.address)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
			pause *= 2
		}
	}
	return fault.New(fault.Precondition, "%s broke off %d times", t.address, maxAttempts)
}

// errIdle ends an attempt in which nothing came for too long.
var errIdle = errors.New("nothing came from the server in time")

// get asks for the file from an offset on and hands the answer to take, whose reads end when nothing comes for too long.
func (t *transfer) get(ctx context.Context, from int64, take func(*http.Response, io.Reader) error) (progress bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(t.o.Idle, func() { cancel(errIdle) })
	defer watch.Stop()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, t.address, nil)
	if err != nil {
		return false, fault.Wrap(fault.Usage, err, "cannot ask for %s", t.address)
	}
	request.Header.Set("User-Agent", "banger/"+build.Version)
	if from > 0 {
		request.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	}
	r, err := t.client.Do(request)
	if err == nil {
		body := &watched{r: r.Body, watch: watch, idle: t.o.Idle}
		err = take(r, body)
		_ = r.Body.Close()
		progress = body.read > 0
	}
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errIdle) {
		err = errIdle
	}
	return progress, err
}

// watched puts the watch off with every byte.
type watched struct {
	r     io.Reader
	watch *time.Timer
	idle  time.Duration
	read  int64
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.r.Read(b)
	if n > 0 {
		w.read += int64(n)
		w.watch.Reset(w.idle)
	}
	return n, err
}

// wrongSum is a file that came whole and is another one.
type wrongSum struct {
	address, got, want string
	resumed            bool
}

func (w *wrongSum) Error() string {
	return fmt.Sprintf("the checksum is %s instead of %s", w.got, w.want)
}

// once goes on with the download and, at its end, verifies it and gives the file its name.
func (t *transfer) once(ctx context.Context) (progress bool, err error) {
	f, err := os.OpenFile(t.path+".part", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return false, fault.Wrap(fault.Precondition, err, "cannot write to %s", t.o.Dir)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	sum := sha256.New()
	have, err := io.Copy(sum, f) // afterwards the offset is its end
	if err != nil {
		return false, fault.Wrap(fault.Precondition, err, "cannot read %s", f.Name())
	}
	progress, err = t.get(ctx, have, func(r *http.Response, body io.Reader) error { return t.take(f, sum, have, r, body) })
	if err != nil {
		return progress, err
	}
	return true, t.finish(f, sum, have > 0)
}

// take appends what comes to the have bytes that are in f and sum.
func (t *transfer) take(f *os.File, sum hash.Hash, have int64, r *http.Response, body io.Reader) error {
	switch {
	case r.StatusCode == http.StatusRequestedRangeNotSatisfiable && have > 0:
		return nil // all of it is there, or it is no part of this file: the checksum tells
	case r.StatusCode == http.StatusPartialContent && have > 0 && rangeBegins(r.Header.Get("Content-Range"), have):
	case r.StatusCode == http.StatusOK:
		if err := restart(f, sum); err != nil {
			return err
		}
		have = 0
	case r.StatusCode == http.StatusPartialContent:
		return errors.Join(fault.New(fault.Precondition, "%s sent another part of the file than it was asked for", t.address), restart(f, sum))
	default:
		return statusFault(r, t.address)
	}
	total := int64(-1)
	if r.ContentLength >= 0 {
		total = have + r.ContentLength
		if err := t.checkRoom(f, r.ContentLength, total); err != nil {
			return err
		}
	}
	counted := &counter{done: have, total: total, tell: t.o.Progress}
	n, err := io.Copy(io.MultiWriter(onDisk{f}, sum, counted), io.LimitReader(body, t.o.Limit-have+1))
	switch {
	case err != nil:
		return err
	case have+n > t.o.Limit:
		return errors.Join(fault.New(fault.Precondition, "%s is larger than %d bytes", t.address, t.o.Limit), restart(f, sum))
	case total >= 0 && have+n < total:
		return io.ErrUnexpectedEOF
	}
	return nil
}

func restart(f *os.File, sum hash.Hash) error {
	sum.Reset()
	_, err := f.Seek(0, io.SeekStart)
	if err := errors.Join(f.Truncate(0), err); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write %s", f.Name())
	}
	return nil
}

// rangeBegins reads "bytes 100-199/200" (RFC 9110, 14.4).
func rangeBegins(header string, at int64) bool {
	return strings.HasPrefix(header, fmt.Sprintf("bytes %d-", at))
}

func (t *transfer) checkRoom(f *os.File, coming, total int64) error {
	if total > t.o.Limit {
		return fault.New(fault.Precondition, "%s has %d bytes, the most is %d", t.address, total, t.o.Limit)
	}
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(f.Fd()), &st); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot tell the free space of %s", t.o.Dir)
	}
	if free := int64(st.Bavail) * int64(st.Bsize); coming > free {
		return noRoom(nil, t.o.Dir, fmt.Sprintf(": %d MB are to come, %d MB are free", coming/1_000_000, free/1_000_000))
	}
	return nil
}

// finish verifies the file and gives it its name. A wrong one is removed, since going on with it leads nowhere.
func (t *transfer) finish(f *os.File, sum hash.Hash, resumed bool) error {
	if got := hex.EncodeToString(sum.Sum(nil)); got != t.o.SHA256 {
		wrong := &wrongSum{address: t.address, got: got, want: t.o.SHA256, resumed: resumed}
		_ = os.Remove(f.Name())
		return fault.Wrap(fault.Precondition, wrong, "%s is not what was expected", t.address).
			WithHint("it was changed, or damaged on its way; nothing of it was used")
	}
	if err := f.Sync(); err != nil {
		return diskFault(err, t.o.Dir)
	}
	if err := os.Rename(f.Name(), t.path); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot name the downloaded file")
	}
	return nil
}

type counter struct {
	done, total int64
	tell        func(done, total int64)
}

func (c *counter) Write(b []byte) (int, error) {
	c.done += int64(len(b))
	c.tell(c.done, c.total)
	return len(b), nil
}

// onDisk tells failures of our disk from those of the network.
type onDisk struct{ f *os.File }

func (d onDisk) Write(b []byte) (int, error) {
	n, err := d.f.Write(b)
	if err != nil {
		err = diskFault(err, filepath.Dir(d.f.Name()))
	}
	return n, err
}

func diskFault(err error, dir string) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return noRoom(err, dir, "")
	}
	return fault.Wrap(fault.Precondition, err, "cannot write to %s", dir)
}

func noRoom(cause error, dir, more string) error {
	return fault.Wrap(fault.Precondition, cause, "no room in %s%s", dir, more).WithHint("free some space there, then try again: what came is kept")
}

func networkFault(err error, address string) error {
	kind := fault.Precondition
	var slow net.Error
	if errors.Is(err, errIdle) || errors.As(err, &slow) && slow.Timeout() {
		kind = fault.Timeout
	}
	var status *serverTrouble
	if errors.As(err, &status) {
		return fault.New(kind, "%s: the server says %s", address, status.text).WithHint("try again later: what came is kept")
	}
	return fault.Wrap(kind, err, "cannot download %s", address).WithHint("check the network, then try again: what came is kept")
}

// serverTrouble is an answer after which asking again may help.
type serverTrouble struct{ text string }

func (s *serverTrouble) Error() string { return "the server says " + s.text }

func statusFault(r *http.Response, address string) error {
	text := fault.Printable(r.Status)
	switch code := r.StatusCode; {
	case code == http.StatusNotFound || code == http.StatusGone:
		return fault.New(fault.NotFound, "there is no %s (%s)", address, text).WithHint("check the address and the version")
	case code == http.StatusUnauthorized || code == http.StatusForbidden || code == http.StatusProxyAuthRequired:
		return fault.New(fault.Precondition, "%s may not be fetched (%s)", address, text).
			WithHint("download it with a browser or curl, and give the file")
	case code >= 500 || code == http.StatusTooManyRequests || code == http.StatusRequestTimeout:
		return &serverTrouble{text}
	}
	return fault.New(fault.Precondition, "cannot download %s: the server says %s", address, text)
}
