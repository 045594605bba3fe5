package trainer

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"trainerd/internal/fault"
)

const (
	codeDiskFull = "disk_full"
	diskRetry    = 5 * time.Second // what a caller is told; the disk is looked at more often
	diskLook     = time.Second
	diskProbe    = 256 << 10 // bytes that must be writable for the disk to count as well again
)

// dataDisk remembers that writes to the data directory fail, and looks at it
// until they do not: readiness must come back when space is freed although
// nobody sends anything to an instance that is not ready.
type dataDisk struct {
	dir string

	mu       sync.Mutex
	err      error // the newest failure; nil while the disk is well
	failures int64
	looking  chan struct{} // closed when the look-out has ended; nil: there is none
	stop     chan struct{} // closed by close
}

// fault makes an error of a write to the data directory one that passes, says so
// to Ready, and names a full disk as such. Other errors keep their kind.
func (d *dataDisk) fault(code, doing string, err error) error {
	var errno syscall.Errno
	f, isFault := fault.As(err)
	if !errors.As(err, &errno) && isFault && f.Kind != fault.Unavailable {
		return err
	}
	out := &fault.Error{Kind: fault.Unavailable, Code: code, Msg: doing, RetryAfter: diskRetry, Err: err}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		out.Code, out.Msg = codeDiskFull, "the disk of the data directory is full: "+doing
	}
	if errno != 0 {
		d.failed(out)
	}
	return out
}

func (d *dataDisk) failed(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = err
	d.failures++
	if d.looking != nil {
		return
	}
	select {
	case <-d.stop:
		return
	default:
	}
	d.looking = make(chan struct{})
	go d.lookOut(d.looking)
}

// lookOut tries the disk until it takes what is written.
func (d *dataDisk) lookOut(ended chan struct{}) {
	defer close(ended)
	for {
		select {
		case <-d.stop:
			return
		case <-time.After(diskLook):
		}
		if d.probe() != nil {
			continue
		}
		d.mu.Lock()
		d.err, d.looking = nil, nil
		d.mu.Unlock()
		return
	}
}

// probe writes a file and removes it.
func (d *dataDisk) probe() error {
	f, err := os.CreateTemp(d.dir, ".probe-*")
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, diskProbe))
	return errors.Join(err, f.Sync(), f.Close(), os.Remove(f.Name()))
}

// state returns how many writes have failed, and how they fail at present, nil when they do not.
func (d *dataDisk) state() (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failures, d.err
}

func openDataDisk(dir string) *dataDisk {
	left, _ := filepath.Glob(filepath.Join(dir, ".probe-*")) // of processes that were killed
	for _, name := range left {
		os.Remove(name)
	}
	return &dataDisk{dir: dir, stop: make(chan struct{})}
}

// close ends the look-out.
func (d *dataDisk) close() {
	d.mu.Lock()
	looking := d.looking
	close(d.stop)
	d.mu.Unlock()
	if looking != nil {
		<-looking
	}
}
