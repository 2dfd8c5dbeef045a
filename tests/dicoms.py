"""Small radiographs as DICOM files."""

from __future__ import annotations

import numpy as np

STORED = np.linspace(0, 4095, 24 * 20).round().astype(np.uint16).reshape(24, 20)  # 12 bits


def dicom(path, pixels=STORED, **tags):
    """Write a minimal radiograph."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.Rows, data.Columns = pixels.shape[-2:] if pixels.dtype == np.uint16 else pixels.shape[:2]
    deep = pixels.dtype == np.uint16
    data.SamplesPerPixel = 1 if deep else 3
    data.PhotometricInterpretation = "MONOCHROME2" if deep else "RGB"
    data.BitsAllocated, data.BitsStored, data.HighBit = (16, 12, 11) if deep else (8, 8, 7)
    data.PixelRepresentation = 0
    if not deep:
        data.PlanarConfiguration = 0
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path
