// Package s3 is a storage.Blob over an S3 service: MinIO, AWS, Garage,
// SeaweedFS, Ceph. It uses only plain S3: conditional writes by If-Match and
// If-None-Match, multipart uploads with a whole-object CRC64NVME, ranges, and
// ListObjectsV2.
//
// No error text holds a credential, and no type of the client library leaves
// the package. It never reads the environment.
//
// Read s3.go, then upload.go.
package s3
