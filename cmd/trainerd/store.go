package main

import (
	"context"

	"trainerd/storage"
	"trainerd/storage/disk"
	"trainerd/storage/s3"
)

// openStore opens "dir:PATH" or "s3://bucket/prefix".
func openStore(ctx context.Context, o ObjectStore, url string) (storage.Blob, error) {
	at, err := storage.ParseURL(url)
	if err != nil {
		return nil, err
	}
	if at.Scheme == "dir" {
		return disk.Open(at.Path)
	}
	return s3.Open(ctx, o.s3Config(at))
}
