// Package store keeps banger's rows in SQLite: VMs and their history. It is the only package that
// speaks SQL. A VM's row is also its intent: a state that is passed through (starting, stopping,
// deleting) is written before the first side effect, so that a daemon that died can be cleaned up after.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"

	"github.com/pressly/goose/v3"
	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"banger/internal/fault"
)

//go:embed migrations/*.sql
var embedded embed.FS

// readers bounds the connections that only read.
const readers = 4

// Store is an open database. Its methods may be called from several goroutines: one connection
// writes, a few others read and never wait for it.
type Store struct {
	path  string
	write *sql.DB
	read  *sql.DB
}

// Open opens the database at path, makes it when there is none, and brings it to the newest
// version. A file that is no database, is damaged, or was written by a newer banger is a Precondition fault.
func Open(ctx context.Context, path string) (*Store, error) {
	migrations, err := fs.Sub(embedded, "migrations")
	if err != nil {
		return nil, err
	}
	return open(ctx, path, migrations, 0)
}

// open is Open with the migrations given, up to a version; 0 means all.
func open(ctx context.Context, path string, migrations fs.FS, version int64) (*Store, error) {
	// SQLite gives its side files the mode of the database, so it has to be private from the start.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot open the database")
	}
	_ = f.Close()
	s := &Store{path: path}
	if err := s.connect(ctx, migrations, version); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Store) connect(ctx context.Context, migrations fs.FS, version int64) error {
	var err error
	// FULL: a commit is on the disk before it is acknowledged, in WAL mode too, at the price of one
	// fsync for each stage of an operation.
	if s.write, err = sql.Open("sqlite", s.dsn("journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)")+"&_txlock=immediate"); err != nil {
		return err
	}
	s.write.SetMaxOpenConns(1)
	if err := s.quickCheck(ctx); err != nil {
		return err
	}
	if err := s.migrate(ctx, migrations, version); err != nil {
		return err
	}
	keepRoom(s.path + "-wal")
	if s.read, err = sql.Open("sqlite", s.dsn("query_only(1)")); err != nil {
		return err
	}
	s.read.SetMaxOpenConns(readers)
	s.read.SetMaxIdleConns(readers)
	return nil
}

// logRoom is what the write-ahead log may take on disk, in bytes. It is begun anew after 1000 pages of 4 KiB, and one
// transaction more (https://www.sqlite.org/wal.html, "Checkpointing").
const logRoom = 5 << 20

// keepRoom has the blocks of the write-ahead log set aside now: on a full disk VMs can be deleted then, which is how
// room is made. Its length stays what SQLite made it. A file system that cannot do that, or has no room, goes without.
func keepRoom(log string) {
	f, err := os.OpenFile(log, os.O_WRONLY, 0) // SQLite keeps its locks on other files, so closing this one drops none
	if err != nil {
		return
	}
	_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, logRoom)
	_ = f.Close()
}

func (s *Store) dsn(pragmas ...string) string {
	q := url.Values{"_pragma": append([]string{"busy_timeout(10000)"}, pragmas...)}
	return "file:" + (&url.URL{Path: s.path}).EscapedPath() + "?" + q.Encode()
}

// quickCheck reads the whole database, which is small, so that damage is found now and not in the middle of a start.
func (s *Store) quickCheck(ctx context.Context) error {
	var result string
	if err := s.write.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&result); err != nil {
		return s.explain(err, "cannot read the database")
	}
	if result != "ok" {
		return s.damaged(errors.New(result))
	}
	return nil
}

func (s *Store) migrate(ctx context.Context, migrations fs.FS, version int64) error {
	p, err := goose.NewProvider(goose.DialectSQLite3, s.write, migrations, goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	have, err := p.GetDBVersion(ctx)
	if err != nil {
		return s.explain(err, "cannot read the version of the database")
	}
	sources := p.ListSources()
	if newest := sources[len(sources)-1].Version; have > newest {
		return fault.New(fault.Precondition, "database %s has version %d, this banger knows up to %d", s.path, have, newest).
			WithHint("a newer banger wrote it: use that one")
	}
	if version == 0 {
		_, err = p.Up(ctx)
	} else {
		_, err = p.UpTo(ctx, version)
	}
	if err != nil {
		return s.explain(err, "cannot bring the database to the newest version")
	}
	return nil
}

// Close closes the database.
func (s *Store) Close() error {
	var errs []error
	for _, db := range []*sql.DB{s.read, s.write} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

// explain turns what SQLite says into a fault where the user can do something about it.
func (s *Store) explain(err error, format string, args ...any) error {
	var known *fault.Error
	if errors.As(err, &known) {
		return err
	}
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return fmt.Errorf(format+": %w", append(args, err)...)
	}
	switch e.Code() & 0xff { // extended codes carry the primary one in the low byte
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return s.damaged(err)
	case sqlite3.SQLITE_INTERRUPT: // how the driver tells that the context ended
		return fault.Wrap(fault.Interrupted, err, format, args...)
	case sqlite3.SQLITE_FULL:
		return fault.Wrap(fault.Precondition, err, "no space left for the database %s", s.path).WithHint("make room on that file system")
	case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM:
		return fault.Wrap(fault.Precondition, err, "database %s cannot be used", s.path).WithHint("check its file system and who may write to it")
	}
	return fmt.Errorf(format+": %w", append(args, err)...)
}

func (s *Store) damaged(err error) error {
	return fault.Wrap(fault.Precondition, err, "database %s is damaged", s.path).
		WithHint("restore a copy of it, or move it away to begin a new one; the disks of the VMs stay where they are")
}
