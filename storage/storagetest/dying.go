package storagetest

import (
	"context"
	"errors"
	"io"
	"sync"

	"trainerd/storage"
)

// ErrDied is what every operation returns once a Dying store is dead.
var ErrDied = errors.New("injected death")

// Dying is a Blob whose first Live operations work and all later ones fail, as
// for a process that is killed or cut off. With Lost, the operation at which it
// dies still takes effect, only its reply is lost.
type Dying struct {
	Blob storage.Blob
	Live int
	Lost bool

	mu   sync.Mutex
	used int
}

// Died reports whether an operation was refused.
func (d *Dying) Died() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used > d.Live
}

// Revive lets all operations work from now on.
func (d *Dying) Revive() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.used, d.Live = 0, int(^uint(0)>>1)
}

// step says whether the next operation runs and whether its reply arrives.
func (d *Dying) step() (run, reply bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.used++
	return d.used <= d.Live || d.Lost && d.used == d.Live+1, d.used <= d.Live
}

// Put implements storage.Blob.
func (d *Dying) Put(ctx context.Context, key string, r io.Reader, size int64, c storage.Condition) (storage.Info, error) {
	run, reply := d.step()
	if !run {
		return storage.Info{}, ErrDied
	}
	info, err := d.Blob.Put(ctx, key, r, size, c)
	if !reply {
		return storage.Info{}, ErrDied
	}
	return info, err
}

// Get implements storage.Blob.
func (d *Dying) Get(ctx context.Context, key string, off, n int64) (io.ReadCloser, storage.Info, error) {
	if _, reply := d.step(); !reply {
		return nil, storage.Info{}, ErrDied
	}
	return d.Blob.Get(ctx, key, off, n)
}

// Stat implements storage.Blob.
func (d *Dying) Stat(ctx context.Context, key string) (storage.Info, error) {
	if _, reply := d.step(); !reply {
		return storage.Info{}, ErrDied
	}
	return d.Blob.Stat(ctx, key)
}

// List implements storage.Blob.
func (d *Dying) List(ctx context.Context, prefix string, f func(storage.Info) error) error {
	if _, reply := d.step(); !reply {
		return ErrDied
	}
	return d.Blob.List(ctx, prefix, f)
}

// Delete implements storage.Blob.
func (d *Dying) Delete(ctx context.Context, key string) error {
	run, reply := d.step()
	if !run {
		return ErrDied
	}
	err := d.Blob.Delete(ctx, key)
	if !reply {
		return ErrDied
	}
	return err
}
