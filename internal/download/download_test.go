package download

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/hosttest"
)

// server serves one content. It breaks off answers after so many bytes as cuts says, one after the other, then no more.
type server struct {
	content []byte
	handler func(w http.ResponseWriter, r *http.Request) bool // true: it has answered

	mu     sync.Mutex
	cuts   []int
	ranges []string // headers of the requests
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.ranges = append(s.ranges, r.Header.Get("Range"))
	cut := -1
	if len(s.cuts) > 0 {
		cut, s.cuts = s.cuts[0], s.cuts[1:]
	}
	s.mu.Unlock()
	if s.handler != nil && s.handler(w, r) {
		return
	}
	if cut < 0 {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(s.content))
		return
	}
	from := 0
	if header, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
		from, _ = strconv.Atoi(strings.TrimSuffix(header, "-"))
		from = min(from, len(s.content))
	}
	rest := s.content[from:]
	w.Header().Set("Content-Length", strconv.Itoa(len(rest)))
	if from > 0 {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(s.content)-1, len(s.content)))
		w.WriteHeader(http.StatusPartialContent)
	}
	_, _ = w.Write(rest[:min(cut, len(rest))])
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

func (s *server) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ranges
}

func sumOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func someBytes(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func start(t *testing.T, s *server) string {
	t.Helper()
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	return web.URL + "/file"
}

func options(t *testing.T, content []byte) Options {
	return Options{Dir: t.TempDir(), SHA256: sumOf(content), Pause: time.Millisecond}
}

func wantContent(t *testing.T, path string, err error, content []byte) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Errorf("%d bytes of %d, error %v", len(got), len(content), err)
	}
}

func TestFile(t *testing.T) {
	s := &server{content: someBytes(200_000)}
	o := options(t, s.content)
	var last, total int64
	o.Progress = func(done, of int64) { last, total = done, of }
	url := start(t, s)
	path, err := File(t.Context(), url, o)
	wantContent(t, path, err, s.content)
	if last != 200_000 || total != 200_000 {
		t.Errorf("told %d of %d", last, total)
	}
	path, err = File(t.Context(), url, o) // it is there: nothing is asked again
	wantContent(t, path, err, s.content)
	if n := len(s.asked()); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestGoesOnWhereItBrokeOff(t *testing.T) {
	s := &server{content: someBytes(300_000), cuts: []int{100_000, 50_000}}
	path, err := File(t.Context(), start(t, s), options(t, s.content))
	wantContent(t, path, err, s.content)
	asked := s.asked()
	if len(asked) != 3 || asked[0] != "" || !strings.HasPrefix(asked[1], "bytes=") || !strings.HasPrefix(asked[2], "bytes=") || asked[1] == asked[2] {
		t.Errorf("asked for %q", asked)
	}
}

// However often and wherever the server breaks off, the file is the right one.
func TestAnyBreaks(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		content := someBytes(rapid.IntRange(0, 5000).Draw(r, "size"))
		s := &server{content: content, cuts: rapid.SliceOfN(rapid.IntRange(1, 2000), 0, 6).Draw(r, "cuts")}
		web := httptest.NewServer(s)
		defer web.Close()
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			r.Fatal(err)
		}
		path, err := File(t.Context(), web.URL, Options{Dir: dir, SHA256: sumOf(content), Pause: time.Microsecond})
		if err != nil {
			r.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			r.Fatalf("%d bytes, error %v", len(got), err)
		}
	})
}

func TestWhatAnEarlierRunLeft(t *testing.T) {
	content := someBytes(10_000)
	whole := func(http.ResponseWriter, *http.Request) bool { return false }
	noRanges := func(w http.ResponseWriter, _ *http.Request) bool {
		_, _ = w.Write(content)
		return true
	}
	cases := map[string]struct {
		left    []byte
		handler func(http.ResponseWriter, *http.Request) bool
		asked   int
	}{
		"a part":                                {content[:4000], whole, 1},
		"all of it":                             {content, whole, 1},
		"too much":                              {append(bytes.Clone(content), 'x'), whole, 2},
		"another file's":                        {bytes.Repeat([]byte("x"), 4000), whole, 2},
		"a part, and the server knows no parts": {content[:4000], noRanges, 1},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			s := &server{content: content, handler: c.handler}
			o := options(t, content)
			if err := os.WriteFile(filepath.Join(o.Dir, o.SHA256+".part"), c.left, 0o600); err != nil {
				t.Fatal(err)
			}
			path, err := File(t.Context(), start(t, s), o)
			wantContent(t, path, err, content)
			if n := len(s.asked()); n != c.asked {
				t.Errorf("asked %d times: %q", n, s.asked())
			}
		})
	}
}

func TestWhatServersAnswer(t *testing.T) {
	content := someBytes(5000)
	status := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool {
			http.Error(w, "<html>\x1b[31mno</html>", code)
			return true
		}
	}
	flipped := bytes.Clone(content)
	flipped[1234] ^= 4
	cases := map[string]struct {
		handler func(http.ResponseWriter, *http.Request) bool
		kind    fault.Kind
		text    string
		asked   int
	}{
		"401": {status(401), fault.Precondition, "401 Unauthorized", 1},
		"403": {status(403), fault.Precondition, "403 Forbidden", 1},
		"404": {status(404), fault.NotFound, "there is no http://", 1},
		"418": {status(418), fault.Precondition, "the server says 418", 1},
		"500": {status(500), fault.Precondition, "the server says 500", attempts},
		"503": {status(503), fault.Precondition, "the server says 503", attempts},
		"nothing": {func(_ http.ResponseWriter, r *http.Request) bool {
			<-r.Context().Done()
			return true
		}, fault.Timeout, "nothing came", attempts},
		"a bit flipped": {func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = w.Write(flipped)
			return true
		}, fault.Precondition, "not what was expected", 1},
		"shorter": {func(w http.ResponseWriter, _ *http.Request) bool {
			_, _ = w.Write(content[:100])
			return true
		}, fault.Precondition, "not what was expected", 1},
		"a part nobody asked for": {func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Range", "bytes 100-199/5000")
			w.WriteHeader(http.StatusPartialContent)
			return true
		}, fault.Precondition, "another part", 1},
		"too large, and says so": {func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Content-Length", "100000000000")
			w.WriteHeader(http.StatusOK)
			return true
		}, fault.Precondition, "the most is 1000000", 1},
		"without an end": {func(w http.ResponseWriter, _ *http.Request) bool {
			block := make([]byte, 64<<10)
			for {
				if _, err := w.Write(block); err != nil {
					return true
				}
			}
		}, fault.Precondition, "larger than 1000000 bytes", 1},
		"a redirection to a file": {func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("Location", "file:///etc/passwd")
			w.WriteHeader(http.StatusFound)
			return true
		}, fault.Precondition, "redirected from http to file", 1},
		"a redirection without an end": {func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "/file", http.StatusFound)
			return true
		}, fault.Precondition, "redirections", 10},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			s := &server{content: content, handler: c.handler}
			o := options(t, content)
			o.Limit, o.Idle = 1_000_000, 5*time.Second
			if what == "nothing" {
				o.Idle = 20 * time.Millisecond
			}
			_, err := File(t.Context(), start(t, s), o)
			if fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "\x1b") {
				t.Errorf("%v: %v", fault.KindOf(err), err)
			}
			if fault.HintOf(err) == "" && c.kind != fault.Precondition {
				t.Errorf("no hint: %v", err)
			}
			if n := len(s.asked()); n != c.asked {
				t.Errorf("asked %d times", n)
			}
			if _, err := os.Stat(filepath.Join(o.Dir, o.SHA256)); err == nil {
				t.Error("there is a file")
			}
		})
	}
}

func TestNobodyListens(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := "http://" + l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = File(t.Context(), address, options(t, nil))
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(fault.HintOf(err), "network") {
		t.Errorf("%v", err)
	}
}

func TestTroubleThatPasses(t *testing.T) {
	s := &server{content: someBytes(100)}
	answers := 0
	s.handler = func(w http.ResponseWriter, _ *http.Request) bool {
		answers++
		if answers < attempts {
			http.Error(w, "busy", http.StatusBadGateway)
			return true
		}
		return false
	}
	path, err := File(t.Context(), start(t, s), options(t, s.content))
	wantContent(t, path, err, s.content)
}

func TestInterrupted(t *testing.T) {
	content := someBytes(50_000)
	ctx, cancel := context.WithCancel(t.Context())
	s := &server{content: content}
	s.handler = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Range") != "" {
			return false
		}
		_, _ = w.Write(content[:20_000])
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return true
	}
	o := options(t, content)
	o.Progress = func(done, _ int64) {
		if done == 20_000 {
			cancel()
		}
	}
	url := start(t, s)
	if _, err := File(ctx, url, o); fault.KindOf(err) != fault.Interrupted {
		t.Fatalf("%v", err)
	}
	o.Progress = nil
	path, err := File(t.Context(), url, o)
	wantContent(t, path, err, content)
	if asked := s.asked(); len(asked) != 2 || asked[1] != "bytes=20000-" {
		t.Errorf("asked for %q", asked)
	}
}

func TestNoRoom(t *testing.T) {
	content := someBytes(3 << 20)
	unsaid := func(w http.ResponseWriter, _ *http.Request) bool { // in chunks, without its length
		for chunk := range slices.Chunk(content, 256<<10) {
			if _, err := w.Write(chunk); err != nil {
				return true
			}
		}
		return true
	}
	for what, handler := range map[string]func(http.ResponseWriter, *http.Request) bool{"length said": nil, "length unsaid": unsaid} {
		o := options(t, content)
		o.Dir = hosttest.SmallDisk(t, 1<<20)
		s := &server{content: content, handler: handler}
		_, err := File(t.Context(), start(t, s), o)
		if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "no room in "+o.Dir) || len(s.asked()) != 1 {
			t.Errorf("%s: %v, asked %d times", what, err, len(s.asked()))
		}
	}
}

func TestTwoAtOnce(t *testing.T) {
	content := someBytes(1000)
	o := options(t, content)
	s := &server{content: content}
	var second error
	url := ""
	s.handler = func(http.ResponseWriter, *http.Request) bool {
		_, second = File(context.Background(), url, o)
		return false
	}
	url = start(t, s)
	path, err := File(t.Context(), url, o)
	wantContent(t, path, err, content)
	if fault.KindOf(second) != fault.Conflict {
		t.Errorf("the second: %v", second)
	}
}

func TestText(t *testing.T) {
	s := &server{content: []byte("abc  file\n")}
	url := start(t, s)
	if text, err := Text(t.Context(), url, Options{}); err != nil || text != "abc  file\n" {
		t.Errorf("%q, %v", text, err)
	}
	s.content = make([]byte, textLimit+1)
	if _, err := Text(t.Context(), url, Options{}); fault.KindOf(err) != fault.Precondition {
		t.Errorf("a large one: %v", err)
	}
	s.handler = func(w http.ResponseWriter, r *http.Request) bool {
		http.NotFound(w, r)
		return true
	}
	if _, err := Text(t.Context(), url, Options{}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("none: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	o := options(t, nil)
	for _, address := range []string{"", "file:///etc/passwd", "ftp://x/y", "http://", "https://user:secret@host/x", "http://host/a\nb", "/path"} {
		if _, err := File(t.Context(), address, o); fault.KindOf(err) != fault.Usage {
			t.Errorf("%q: %v", address, err)
		}
	}
	for _, sum := range []string{"", "abc", strings.Repeat("A", 64), strings.Repeat("0", 65), "../" + strings.Repeat("0", 61)} {
		o.SHA256 = sum
		if _, err := File(t.Context(), "http://127.0.0.1:1/", o); fault.KindOf(err) != fault.Usage {
			t.Errorf("%q: %v", sum, err)
		}
	}
}

func TestNoWayFromHTTPSToHTTP(t *testing.T) {
	plain := httptest.NewServer(&server{content: []byte("x")})
	defer plain.Close()
	secure := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
	defer secure.Close()
	client := newClient()
	client.Transport = secure.Client().Transport
	r, err := client.Get(secure.URL)
	if err == nil {
		_ = r.Body.Close()
	}
	var f *fault.Error
	if !errors.As(err, &f) || !strings.Contains(err.Error(), "redirected from https to http") {
		t.Errorf("%v", err)
	}
}

func TestOldOnesAreForgotten(t *testing.T) {
	content := someBytes(10)
	o := options(t, content)
	old, recent, foreign := sumOf([]byte("1"))+".part", sumOf([]byte("2"))+".part", "notes.txt"
	long := time.Now().Add(-30 * 24 * time.Hour)
	for _, name := range []string{old, recent, foreign} {
		path := filepath.Join(o.Dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if name != recent {
			if err := os.Chtimes(path, long, long); err != nil {
				t.Fatal(err)
			}
		}
	}
	path, err := File(t.Context(), start(t, &server{content: content}), o)
	wantContent(t, path, err, content)
	for name, want := range map[string]bool{old: false, recent: true, foreign: true} {
		if _, err := os.Stat(filepath.Join(o.Dir, name)); (err == nil) != want {
			t.Errorf("%s is there: %t", name, err == nil)
		}
	}
}
