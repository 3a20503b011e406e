// Package oci reads container images: from a registry, from an OCI layout directory, from an archive as "docker save"
// and its like write it. What it gives are layers, verified as they are read, and what the image says about itself.
package oci

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"strings"
	"sync/atomic"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"banger/internal/debian"
	"banger/internal/fault"
	"banger/internal/image/layer"
)

// maxLayers bounds the layers of an image; engines stop at 127.
const maxLayers = 512

// Image is a container image whose layers are at hand.
type Image struct {
	Reference string        // canonical, with registry and tag; empty: it has none
	Digest    string        // of its manifest, "sha256:" and 64 hex digits; empty: it has none
	Env       []string      // NAME=value
	Layers    []layer.Layer // the lowest first
	Bytes     int64         // of the layers as they are stored
}

// Options say which image is wanted, and where there is room.
type Options struct {
	Dir          string // for temporary files, the caller's to remove
	Architecture string // as Go and Debian call it
	Select       string // of several images in one file, the one of this name
	// Progress is told how far the fetching is; nil: nobody wants to know.
	Progress func(done, all int64)
}

func (o Options) platform() v1.Platform {
	return v1.Platform{OS: "linux", Architecture: o.Architecture}
}

// describe checks what an image says of itself, and takes over what is kept of it.
func describe(i v1.Image, o Options) (*Image, []v1.Layer, error) {
	config, err := i.ConfigFile()
	if err != nil {
		return nil, nil, explainDamage(err)
	}
	if config.OS != "" && config.OS != "linux" || config.Architecture != "" && config.Architecture != o.Architecture {
		return nil, nil, fault.New(fault.Precondition, "the image is for %s/%s, this machine runs linux/%s", config.OS, config.Architecture, o.Architecture)
	}
	layers, err := i.Layers()
	if err != nil {
		return nil, nil, explainDamage(err)
	}
	if len(layers) == 0 || len(layers) > maxLayers {
		return nil, nil, fault.New(fault.Precondition, "the image has %d layers", len(layers))
	}
	out := &Image{Env: config.Config.Env}
	if d, err := i.Digest(); err == nil {
		out.Digest = d.String()
	}
	return out, layers, nil
}

// explainDamage makes a fault of whatever a file with an image did not hold.
func explainDamage(err error) error {
	if fault.KindOf(err) != fault.Unexpected {
		return err
	}
	return fault.Wrap(fault.Precondition, err, "the image is damaged")
}

// open makes a layer of stored bytes. Its content is checked against the image's configuration when it is
// first read to its end.
func open(l v1.Layer, stored func() (io.ReadCloser, error)) (layer.Layer, error) {
	media, err := l.MediaType()
	if err != nil {
		return nil, explainDamage(err)
	}
	if !media.IsLayer() || media == types.DockerForeignLayer || strings.Contains(string(media), "encrypted") {
		return nil, fault.New(fault.Precondition, "the image has a layer of type %s, which cannot be read", media)
	}
	want, err := l.DiffID()
	if err != nil {
		return nil, explainDamage(err)
	}
	var checked atomic.Bool
	return func() (io.ReadCloser, error) {
		packed, err := stored()
		if err != nil {
			return nil, err
		}
		content, err := debian.Decompress(packed)
		if err != nil {
			return nil, errors.Join(explainDamage(err), packed.Close())
		}
		s := &stream{r: content, close: []io.Closer{content, packed}}
		if !checked.Load() {
			s.sum, s.want, s.good = sha256.New(), want.Hex, func() { checked.Store(true) }
		}
		return s, nil
	}, nil
}

// stream is an unpacked layer.
type stream struct {
	r     io.Reader
	close []io.Closer
	sum   hash.Hash // nil: it was checked before
	want  string
	good  func()
}

func (s *stream) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if s.sum == nil {
		return n, err
	}
	_, _ = s.sum.Write(b[:n]) // a hash never fails
	if errors.Is(err, io.EOF) {
		if got := hex.EncodeToString(s.sum.Sum(nil)); got != s.want {
			return n, fault.New(fault.Precondition, "a layer of the image is damaged: its checksum is %s instead of %s", got, s.want)
		}
		s.good()
	}
	return n, err
}

func (s *stream) Close() error {
	var errs []error
	for _, c := range s.close {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// openAll makes layers that are read from where the image is.
func openAll(out *Image, layers []v1.Layer) (*Image, error) {
	for _, l := range layers {
		opened, err := open(l, func() (io.ReadCloser, error) {
			r, err := l.Compressed()
			if err != nil {
				return nil, explainDamage(err)
			}
			return r, nil
		})
		if err != nil {
			return nil, err
		}
		if size, err := l.Size(); err == nil {
			out.Bytes += size
		}
		out.Layers = append(out.Layers, opened)
	}
	return out, nil
}

// copyContext copies until the end, or the end of ctx.
func copyContext(ctx context.Context, w io.Writer, r io.Reader) (int64, error) {
	return io.Copy(w, readerFunc(func(b []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return r.Read(b)
	}))
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// writeNew writes a new file.
func writeNew(ctx context.Context, path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if _, err = copyContext(ctx, f, r); err != nil {
		err = fmt.Errorf("cannot write %s: %w", path, err)
	}
	return errors.Join(err, f.Close())
}
