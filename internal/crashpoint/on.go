//go:build crashpoints

package crashpoint

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// What the environment says. Only processes that a crash test starts have it.
const (
	EnvAt     = "TRAINERD_CRASH_AT"     // NAME:N, die when NAME is reached for the N-th time
	EnvOff    = "TRAINERD_CRASH_OFF"    // NAME,NAME: leave these out
	EnvPhases = "TRAINERD_CRASH_PHASES" // file of Phases counters
	EnvShadow = "TRAINERD_CRASH_SHADOW" // directory of the power-cut image
)

var (
	at     string
	left   atomic.Int64
	off    = map[string]bool{}
	phases []byte // shared with whoever maps the file
	image  *Shadow
)

func init() {
	if name, n, ok := strings.Cut(os.Getenv(EnvAt), ":"); ok {
		times, err := strconv.ParseInt(n, 10, 64)
		check(err)
		at = name
		left.Store(times)
	}
	for name := range strings.SplitSeq(os.Getenv(EnvOff), ",") {
		off[name] = name != ""
	}
	if path := os.Getenv(EnvPhases); path != "" {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		check(err)
		phases, err = syscall.Mmap(int(f.Fd()), 0, 4*int(Phases+1), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
		check(err)
		check(f.Close())
	}
	if dir := os.Getenv(EnvShadow); dir != "" {
		image = OpenShadow(dir)
	}
}

// check ends a process whose test harness is broken.
func check(err error) {
	if err != nil {
		panic("crashpoint: " + err.Error())
	}
}

// Reach marks a point at which a crash test may kill the process.
func Reach(name string) {
	if name != at || left.Add(-1) != 0 {
		return
	}
	if phases != nil {
		atomic.StoreInt32(counter(Phases), 1) // it was the point that killed
	}
	check(syscall.Kill(os.Getpid(), syscall.SIGKILL))
	select {}
}

func counter(p Phase) *int32 { return (*int32)(unsafe.Pointer(&phases[4*int(p)])) }

// Enter marks the beginning of a phase and returns what ends it.
func Enter(p Phase) (leave func()) {
	if phases == nil {
		return func() {}
	}
	atomic.AddInt32(counter(p), 1)
	return func() { atomic.AddInt32(counter(p), -1) }
}

// Off says that a durable write is left out, to show that a test notices.
func Off(name string) bool { return off[name] }

// Sync is f.Sync, unless it is left out. What is a file or a directory of the
// system is durable in the image from then on.
func Sync(name string, f interface{ Sync() error }) error {
	if off[name] {
		return nil
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if named, ok := f.(interface{ Name() string }); ok && image != nil {
		image.Durable(named.Name())
	}
	return nil
}

// Transact runs a transaction that is durable in the file at path when it returns nil.
func Transact(path string, do func() error) error {
	if image == nil {
		return do()
	}
	image.mu.Lock()
	defer image.mu.Unlock()
	if err := do(); err != nil || off["records.fsync"] {
		return err
	}
	image.durable(path)
	return nil
}
