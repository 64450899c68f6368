"""How videos are measured: manifests, decoded views, shared features, the registry of metrics, statistics"""
