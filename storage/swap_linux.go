package storage

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

func exchangeNames(a, b string) error {
	err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("exchange directories: %w", errors.ErrUnsupported)
	}
	return err
}
